"""The training loop, as the algorithm reads: behavior log-probs under the sampling weights, updates, publication.

All ranks run it together; only rank 0 has a feed, and what it fetches goes to the others.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from minpro_megatron.actor.behavior import flat, mini_batches_of, score_and_record, score_by_version
from minpro_megatron.actor.memory import rank_memory
from minpro_megatron.actor.policy import Policy, UpdateResult, learning_rate_at
from minpro_megatron.actor.routing import Routes
from minpro_megatron.actor.run_checkpoints import RunCheckpoints
from minpro_megatron.actor.save_schedule import EndedEarly, SaveSchedule
from minpro_megatron.actor.start_gate import refuse_broken_scores, refuse_different_models, refuse_unequal_start
from minpro_megatron.batching.collate import TokenSequence
from minpro_megatron.batching.sequences import (
    behavior_record,
    token_sequences,
    trained_step,
    with_known_scores,
    with_log_probs,
)
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import RunFailed
from minpro_megatron.monitor.alarms import Alarm, AlarmStop
from minpro_megatron.monitor.histograms import merge_histograms
from minpro_megatron.monitor.metrics import Metric, largest, mean, merge, total, values
from minpro_megatron.monitor.step_report import StepReport, batch_metrics
from minpro_megatron.monitor.trace import NoTracer, Tracer
from minpro_megatron.monitor.watchdog import Watchdog
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.records import Batch, CollectorTotals, EvaluationResult, PublishLease
from minpro_megatron.rollout.batch_source import BatchSource
from minpro_megatron.rollout.checkpoint_folder import score_of
from minpro_megatron.rollout.resume_point import RunManifest, TrainerState
from minpro_megatron.weights.publish import Publisher
from minpro_megatron.weights.publish_report import PublishReport, publication_metrics

REFERENCE = "reference"  # name of the kept initial weights
MOST_BROKEN_UPDATES = 3  # in a row
PHASES = ("wait_for_batch", "score", "train", "publish", "checkpoint", "monitor")


@dataclass
class Trainer:
    """One run of the trainer on this rank."""

    config: RunConfig
    mesh: Mesh
    policy: Policy
    publisher: Publisher
    checkpoints: RunCheckpoints
    resumed_from: RunManifest | None
    watchdog: Watchdog
    feed: BatchSource | None = None  # rank 0's
    report: StepReport | None = None  # rank 0's
    save_schedule: SaveSchedule | None = None  # rank 0's
    before_early_end: Callable[[int, str], None] = lambda version, reason: None  # rank 0's: it saves for the last time
    tracer: Tracer = field(default_factory=NoTracer)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    updates: int = 0
    broken_in_a_row: int = 0
    changed: bool = False  # the weights, by the last step's updates
    # fetched and scored, by batch index: behavior log-probs, and each mini-batch's routes if they are replayed
    _ready: dict[int, tuple[Batch, np.ndarray, list[Routes] | None]] = field(default_factory=dict)
    _version_in_place: int = 0
    _first_mini_batch_seen: bool = False
    _publications: list[PublishReport] = field(default_factory=list)  # of this step so far
    _fleet: dict[str, float] = field(default_factory=dict)  # metrics of the last lease
    _saved_version: int | None = None  # by this start

    def run(self) -> CollectorTotals | None:
        """Trains through all global steps that are left. Returns the collector's totals on rank 0, None elsewhere.

        Raises EndedEarly on all ranks, after a last checkpoint, where the save schedule ends this start.
        """
        first = self._begin()
        for index in range(first, min(first + self._lookahead, self.config.num_global_steps)):
            self._fetch_and_score(index)
        start, before = time.monotonic(), dict(self.seconds)
        if self.save_schedule:
            self.save_schedule.begin()
        saves = False
        for step in range(first, self.config.num_global_steps):
            self.tracer.step(step)
            metrics, histograms, batch = self._step(step)
            self._publish(step + 1, changed=self.changed)
            spent = {phase: self.seconds[phase] - before[phase] for phase in PHASES}
            step_s = time.monotonic() - start
            # the time that writing metrics and checkpoint takes counts for the next step
            start, before = time.monotonic(), dict(self.seconds)
            alarms = self._write(step, batch, metrics, histograms, spent, step_s)
            # after the step's metrics, which a run that goes on from this checkpoint does not write again
            saves = self._save_or_end(step + 1, alarms)
        self._finish_saving(self.config.num_global_steps if saves else None)
        return self._finish()

    def _begin(self) -> int:
        """The first global step: 0, or that of the checkpoint, whose weights are then in place and on the servers."""
        if self.config.loss.kl.enabled:
            self.policy.keep_weights(REFERENCE)  # the initial weights, also when the run goes on later
        manifest = self.resumed_from
        if manifest is not None:
            with self.watchdog.guard("loading the checkpoint"):
                self.checkpoints.load(self.policy, manifest)
            self.updates = manifest.updates
            self._version_in_place = manifest.policy_version
        if self.feed:
            self.feed.start(self._version_in_place)
        if manifest is not None:
            self._publish(self._version_in_place, changed=False)
        return self._version_in_place

    @property
    def _lookahead(self) -> int:
        """How many steps before its own a batch is fetched and scored. Delay mode: n, right after step k - n, when the
        weights that sampled it are the last ones but one; bounded mode: 0, for it holds tokens of up to now."""
        return self.config.staleness.delay_steps if self.config.staleness.mode == "delay" else 0

    def _step(self, step: int) -> tuple[dict[str, Metric], dict[str, np.ndarray], Batch]:
        """Global step `step` consumes batch `step`.

        In delay mode batch k was sampled with version max(0, k - n), and its behavior log-probs are computed under
        these very weights: for k < n before the first update, else right after step k - n, when the trainer is one step
        ahead of the servers and swaps the sampling weights in once more. With n = 0, and in bounded mode, where a batch
        holds tokens of the versions step - max_staleness .. step, it is scored right before its step.
        """
        ahead = self._lookahead
        if ahead == 0:
            self._fetch_and_score(step)
        batch, behavior_log_probs, routes = self._ready.pop(step)
        metrics, histograms = self._train_on(batch, behavior_log_probs, routes, step)
        if ahead and step + ahead < self.config.num_global_steps:
            with self._weights_of(step):
                self._fetch_and_score(step + ahead)
        return metrics, histograms, batch

    def _kept_name(self, version: int) -> str:
        """As many snapshots as versions that may still be asked for: of delay mode one, the servers' version."""
        settings = self.config.staleness
        return "sampling" if settings.mode == "delay" else f"sampling {version % (settings.max_staleness + 1)}"

    @contextmanager
    def _weights_of(self, version: int) -> Iterator[None]:
        """Within: the weights of `version` are in place."""
        if version == self._version_in_place:
            yield
            return
        before, self._version_in_place = self._version_in_place, version
        with self.policy.kept_weights(self._kept_name(version)):
            yield
        self._version_in_place = before

    def _fetch_and_score(self, index: int) -> None:
        with self._timed("wait_for_batch"):
            batch = self._fetch(index)
        with self._timed("score"), self.watchdog.guard(f"scoring batch {index}"):
            groups = self._sequences(batch)
            log_probs, routes = self._behavior_log_probs(batch, groups)
            refuse_broken_scores(index, log_probs)
            if index == 0:
                refuse_different_models(flat(groups), log_probs)
            if self.feed and not all(group.is_scored for group in batch.groups):
                version = self._version_in_place if self.config.staleness.mode == "delay" else -1
                self.feed.scored(behavior_record(batch, version, log_probs))
        self._ready[index] = (batch, log_probs, routes)

    def _fetch(self, index: int) -> Batch:
        while True:
            answer = self.mesh.from_rank_0(self.feed.batch(index) if self.feed else None)
            if isinstance(answer, Batch):
                return answer
            self._send(answer, changed=False)

    def _behavior_log_probs(
        self, batch: Batch, groups: list[list[TokenSequence]]
    ) -> tuple[np.ndarray, list[Routes] | None]:
        if self.config.staleness.behavior_log_probs == "rollout":
            return np.concatenate([sequence.rollout_log_probs for sequence in flat(groups)]), None
        mini_batches = self._mini_batches(groups)
        if self.config.model.routing_replay == "scored":
            return score_and_record(self.policy, mini_batches)
        # what was scored before the run was interrupted stays as it is
        versions = [
            [None if group.is_scored else response.policy_versions for response in group.responses]
            for group in batch.groups
        ]
        fresh = score_by_version(self.policy, mini_batches, self._mini_batches(versions), self._weights_of)
        return with_known_scores(batch, fresh), None

    def _sequences(self, batch: Batch) -> list[list[TokenSequence]]:
        return token_sequences(batch, self.config.loss, self.config.sampling.max_response_tokens)

    def _mini_batches[Item](self, groups: list[list[Item]]) -> list[list[Item]]:
        return mini_batches_of(groups, self.config.batch.mini_batch_prompts)

    def _other_log_probs(self, groups: list[list[TokenSequence]], routes: list[Routes] | None) -> dict[str, np.ndarray]:
        """What the loss needs beside the behavior log-probs: a scoring pass each, under weights of their own."""
        found, mini_batches = {}, self._mini_batches(groups)
        if self.config.loss.decoupled.enabled:
            of_mini_batches = routes or [None] * len(mini_batches)
            parts = [self.policy.score(*pair) for pair in zip(mini_batches, of_mini_batches, strict=True)]
            found["proximal_log_probs"] = np.concatenate(parts)
        if self.config.loss.kl.enabled:
            with self.policy.kept_weights(REFERENCE):
                parts = [self.policy.score(mini_batch) for mini_batch in mini_batches]
            found["reference_log_probs"] = np.concatenate(parts)
        return found

    def _train_on(
        self, batch: Batch, behavior_log_probs: np.ndarray, routes: list[Routes] | None, step: int
    ) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
        with self._timed("train"):
            self.policy.keep_weights(self._kept_name(step))  # for scoring, and for servers that come back meanwhile
            groups = self._sequences(batch)
            with self.watchdog.guard(f"scoring for global step {step}"):
                other = self._other_log_probs(groups, routes)
            groups = with_log_probs(groups, behavior_log_probs=behavior_log_probs, **other)
            learning_rate = learning_rate_at(self.config.optimizer, step)
            parts, histograms, log_probs = [], [], []
            self.changed = False
            for index, mini_batch in enumerate(self._mini_batches(groups)):
                seed = derive_seed(self.config.seed, "update", self.updates)
                with self.watchdog.guard(f"update {self.updates} (global step {step})"):
                    result = self.policy.update(mini_batch, learning_rate, seed, routes[index] if routes else None)
                self._refuse_an_unequal_start(result)
                self.updates += 1
                self.changed |= result.applied and result.grad_norm * result.learning_rate > 0
                self._refuse_a_diverged_run(result, step)
                parts.append(result.metrics)
                histograms.append(result.histograms)
                log_probs.append(result.log_probs)
                if self.mesh.rank == 0:  # the same on all ranks: stated once
                    parts.append(
                        {
                            "optimizer/grad_norm": mean(result.grad_norm, 1),
                            "optimizer/grad_norm_max": largest(result.grad_norm),
                            "optimizer/learning_rate": largest(result.learning_rate),
                            "optimizer/skipped_updates": total(0.0 if result.applied else 1.0),
                        }
                    )
            self._version_in_place = step + 1
            parts.append(rank_memory(self.mesh.device))
            of_ranks = self.mesh.from_all_ranks((merge(parts), merge_histograms(histograms)))
            metrics = merge([part for part, _ in of_ranks])
        recorded = [found for found in log_probs if found is not None]
        if self.feed:
            self.feed.consumed(trained_step(batch, step, recorded))
        if self.report:
            self.report.trained(behavior_log_probs, recorded)
        return metrics, merge_histograms([part for _, part in of_ranks])

    def _refuse_an_unequal_start(self, result: UpdateResult) -> None:
        settings = self.config.staleness
        # the servers' log-probs differ by what their engine rounds
        if (
            settings.behavior_log_probs == "rollout"
            or self._first_mini_batch_seen
            or result.skipped == "no trained token"
        ):
            return
        self._first_mini_batch_seen = True
        if self._version_in_place == 0:
            of_ranks = self.mesh.from_all_ranks((result.metrics, result.histograms))
            metrics = values(merge([metrics for metrics, _ in of_ranks]))
            log_ratios = merge_histograms([histograms for _, histograms in of_ranks])["ratio/log"]
            refuse_unequal_start(metrics, log_ratios, self.config.model.dtype)

    def _refuse_a_diverged_run(self, result: UpdateResult, step: int) -> None:
        """Raises ValueError at the third update in a row whose gradient is not finite: it will not get better."""
        self.broken_in_a_row = self.broken_in_a_row + 1 if result.skipped == "gradient not finite" else 0
        if self.broken_in_a_row < MOST_BROKEN_UPDATES:
            return
        metrics = values(merge(self.mesh.from_all_ranks(result.metrics)))
        names = self.policy.parameters_with_broken_gradient()
        raise RunFailed(
            f"global step {step}, update {self.updates}: the gradient was not finite {self.broken_in_a_row} times in "
            f"a row. Loss {metrics['objective/loss']:.4g}, largest ratio {metrics['ratio/max']:.4g}, entropy "
            f"{metrics['policy/entropy']:.4g}; {len(names)} parameters have such gradients, first {names[:3]}. "
            "If the loss is not finite either, the weights or the log-probs are broken: go back to earlier weights and "
            "lower optimizer.learning_rate; if it is, the backward pass overflowed: look at those parameters"
        )

    def _publish(self, version: int, changed: bool) -> None:
        """The weights in place go to the servers as `version`."""
        with self._timed("publish"):
            while True:
                lease = self.mesh.from_rank_0(self.feed.publish_begin(version) if self.feed else None)
                self._send(lease, changed)
                if lease.version == version:
                    break
            self._note_scores(lease.evaluations)
            if self.report:
                self.report.evaluations(lease.evaluations)

    def _note_scores(self, results: Sequence[EvaluationResult]) -> None:
        """Held-out evaluations decide which checkpoints are the best."""
        for result in results:
            if not result.benchmark:
                score = score_of(result, self.config.checkpoint)
                self.checkpoints.note_score(result.policy_version, score)

    def _send(self, lease: PublishLease, changed: bool) -> None:
        """The lease's version goes to the lease's servers."""
        with self.watchdog.guard(f"publishing version {lease.version}"), self._weights_of(lease.version):
            report = self.publisher.publish(lease if self.mesh.rank == 0 else None, changed)
        if self.feed and report:
            self.feed.publish_end(lease.version, report.held_by, report.late)
            if lease.servers:  # training on a journal, there are none
                self._publications.append(report)
                self._fleet = lease.metrics

    def _save_or_end(self, version: int, alarms: list[Alarm]) -> bool:
        """Whether the checkpoint of `version` is begun. Raises AlarmStop or EndedEarly, once it is complete, where this
        start ends."""
        stop = self._alarm_to_stop_on(alarms) if version < self.config.num_global_steps else None
        decision = self.mesh.from_rank_0(self.save_schedule.after_step(version) if self.save_schedule else None)
        end = decision.end if decision and stop is None else ""
        if end and self.save_schedule:
            self.before_early_end(version, end)
        saves = stop is not None or (decision is not None and decision.save)
        self._save(version, saves)
        if stop is not None or end:
            self._finish_saving(version)
        if stop is not None:
            raise AlarmStop(f"alarms.stop_on: {stop}")
        if end:
            raise EndedEarly(version, end)
        return saves

    def _save(self, version: int, begin: bool) -> None:
        with self._timed("checkpoint"), self.watchdog.guard(f"the checkpoint of version {version}"):
            if begin:
                self._begin_save(version)
            self._complete(self.checkpoints.poll())

    def _begin_save(self, version: int) -> None:
        if self.feed:
            self.feed.checkpoint_begin(version)
        num_steps = self.config.num_global_steps
        state = TrainerState(policy_version=version, updates=self.updates, num_global_steps=num_steps)
        self.checkpoints.save(self.policy, state)

    def _complete(self, versions: list[int]) -> None:
        for version in versions if self.feed else []:
            assert self.feed is not None
            self.feed.checkpoint_end(version)
        if versions:
            self._saved_version = versions[-1]
            if self.save_schedule:
                self.save_schedule.saved(self.checkpoints.last_save_s)

    def _finish_saving(self, last: int | None) -> None:
        """Completes the save under way. The checkpoint of version `last` is tried a second time if it has failed, for
        there is no later one; raises SaveError if that fails as well."""
        with self.watchdog.guard("the last checkpoint"):
            self._complete(self.checkpoints.finish())
            if last is not None and self._saved_version != last:
                self._begin_save(last)
                self._complete(self.checkpoints.finish())

    def _alarm_to_stop_on(self, alarms: list[Alarm]) -> Alarm | None:
        """Of the alarms that rank 0 has raised, the first one that ends the run."""
        stop_on = self.config.alarms.stop_on
        if not stop_on:
            return None
        return self.mesh.from_rank_0(next((alarm for alarm in alarms if alarm.name in stop_on), None))

    def _finish(self) -> CollectorTotals | None:
        while True:
            answer = self.mesh.from_rank_0(self.feed.finish() if self.feed else None)
            if isinstance(answer, CollectorTotals):
                break
            self._send(answer, changed=False)
        self._note_scores(answer.evaluations)
        if self.report:
            self.report.finished(answer)
        return answer if self.feed else None

    def _write(
        self,
        step: int,
        batch: Batch,
        metrics: dict[str, Metric],
        histograms: dict[str, np.ndarray],
        spent: dict[str, float],
        step_s: float,
    ) -> list[Alarm]:
        """Returns the alarms that the step raises, on rank 0."""
        if self.report is None:
            return []
        with self._timed("monitor"):
            times = {f"time/{phase}_s": seconds for phase, seconds in spent.items()} | {"time/step_s": step_s}
            published = publication_metrics(self._publications) | self._fleet
            self._publications.clear()
            of_batch = batch_metrics(batch, step, self.config.collector.right_reward)
            scalars = values(metrics | of_batch) | times | published
            return self.report.step(step, scalars, histograms, batch)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        with self.tracer.span(phase):
            yield
        self.seconds[phase] += time.monotonic() - start
