"""The training loop, as the algorithm reads: delay mode, behavior log-probs under the sampling weights.

All ranks run it together; only rank 0 has a Feed, and what it fetches goes to the others.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from minpro_megatron.actor.policy import Policy, UpdateResult, learning_rate_at
from minpro_megatron.actor.routing import Routes
from minpro_megatron.batching.collate import TokenSequence
from minpro_megatron.batching.sequences import behavior_record, token_sequences, with_log_probs
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.monitor.histograms import merge_histograms
from minpro_megatron.monitor.metrics import Metric, largest, mean, merge, total, values
from minpro_megatron.monitor.step_report import StepReport, batch_metrics
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.records import Batch, CollectorTotals, PublishLease
from minpro_megatron.rollout.feed import Feed
from minpro_megatron.rollout.staleness import sampling_version
from minpro_megatron.weights.publish import Publisher

LARGEST_START_MISMATCH = 0.1  # nats, mean over tokens; float32 engines differ by 1e-7, bfloat16 ones by about 1e-2
SAMPLING, REFERENCE = "sampling", "reference"  # names of kept weights
MOST_BROKEN_UPDATES = 3  # in a row
PHASES = ("wait_for_batch", "score", "train", "publish")


def refuse_different_models(sequences: Sequence[TokenSequence], log_probs: np.ndarray) -> None:
    """Raises ValueError if the servers sampled the first batch with other weights than the trainer's initial ones."""
    rollout = np.concatenate([sequence.rollout_log_probs for sequence in sequences])
    mismatch = float(np.abs(rollout - log_probs).mean())
    if not mismatch <= LARGEST_START_MISMATCH:
        raise ValueError(
            f"batch 0: the servers' log-probs differ from the trainer's by {mismatch:.3g} nats a token (limit "
            f"{LARGEST_START_MISMATCH}): model.megatron_path and model.hf_path hold different weights; convert again"
        )


def refuse_broken_scores(index: int, log_probs: np.ndarray) -> None:
    """Raises ValueError if a log-prob is NaN or infinite: ratios against it would be no numbers either."""
    broken = int(np.count_nonzero(~np.isfinite(log_probs)))
    if broken:
        raise ValueError(
            f"batch {index}: {broken} of {len(log_probs)} behavior log-probs are not finite: the weights hold NaN or "
            "infinity; look for a diverging loss or gradient norm before it, and start again from earlier weights"
        )


def _flat(groups: Sequence[Sequence[TokenSequence]]) -> list[TokenSequence]:
    return [sequence for group in groups for sequence in group]


@dataclass
class Trainer:
    """One run of the trainer on this rank."""

    config: RunConfig
    mesh: Mesh
    policy: Policy
    publisher: Publisher
    feed: Feed | None  # rank 0's
    report: StepReport | None  # rank 0's
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    updates: int = 0
    broken_in_a_row: int = 0
    changed: bool = False  # the weights, by the last step's updates
    # fetched and scored, by batch index: behavior log-probs, and each mini-batch's routes if they are replayed
    _ready: dict[int, tuple[Batch, np.ndarray, list[Routes] | None]] = field(default_factory=dict)

    def run(self) -> CollectorTotals | None:
        """Trains through all global steps. Returns the collector's totals on rank 0, None elsewhere.

        Batch k is sampled with version max(0, k - n) and consumed at step k. Its behavior log-probs are computed
        under the very weights that sampled it: for k < n before the first update, else right after step k - n, when
        the trainer is one step ahead of the servers and swaps the sampling weights in once more (n = 0: right before
        step k).
        """
        delay = self.config.staleness.delay_steps
        if self.config.loss.kl.enabled:
            self.policy.keep_weights(REFERENCE)
        for index in range(min(delay, self.config.num_global_steps)):
            self._fetch_and_score(index)
        for step in range(self.config.num_global_steps):
            start, before = time.monotonic(), dict(self.seconds)
            if delay == 0:
                self._fetch_and_score(step)
            else:
                self.policy.keep_weights(SAMPLING)
            batch, behavior_log_probs, routes = self._ready.pop(step)
            metrics, histograms = self._train_on(batch, behavior_log_probs, routes, step)
            if delay > 0 and step + delay < self.config.num_global_steps:
                with self.policy.kept_weights(SAMPLING):
                    self._fetch_and_score(step + delay)
            self._publish(step + 1, changed=self.changed)
            spent = {phase: self.seconds[phase] - before[phase] for phase in PHASES}
            self._write(step, batch, metrics, histograms, spent, time.monotonic() - start)
        totals = self.feed.finish() if self.feed else None
        if self.report and totals:
            self.report.evaluations(totals.evaluations)
        return totals

    def _fetch_and_score(self, index: int) -> None:
        with self._timed("wait_for_batch"):
            batch = self.mesh.from_rank_0(self.feed.batch(index) if self.feed else None)
        with self._timed("score"):
            groups = self._sequences(batch)
            sequences = _flat(groups)
            log_probs, routes = self._behavior_log_probs(groups)
            refuse_broken_scores(index, log_probs)
            if index == 0:
                refuse_different_models(sequences, log_probs)
            if self.feed:
                version = sampling_version(index, self.config.staleness.delay_steps)
                self.feed.scored(behavior_record(batch, version, log_probs))
        self._ready[index] = (batch, log_probs, routes)

    def _behavior_log_probs(self, groups: list[list[TokenSequence]]) -> tuple[np.ndarray, list[Routes] | None]:
        if self.config.model.routing_replay == "none":
            return self.policy.score(_flat(groups)), None
        # packed as the updates will pack them, so that every route stays on the rank that needs it again
        scored = [self.policy.score_and_record(mini_batch) for mini_batch in self._mini_batches(groups)]
        return np.concatenate([log_probs for log_probs, _ in scored]), [routes for _, routes in scored]

    def _sequences(self, batch: Batch) -> list[list[TokenSequence]]:
        return token_sequences(batch, self.config.loss, self.config.sampling.max_response_tokens)

    def _mini_batches(self, groups: list[list[TokenSequence]]) -> list[list[TokenSequence]]:
        size = self.config.batch.mini_batch_prompts
        return [_flat(groups[first : first + size]) for first in range(0, len(groups), size)]

    def _other_log_probs(self, groups: list[list[TokenSequence]], routes: list[Routes] | None) -> dict[str, np.ndarray]:
        """What the loss needs beside the behavior log-probs: a scoring pass each, under weights of their own."""
        found = {}
        if self.config.loss.decoupled.enabled:
            mini_batches = self._mini_batches(groups)
            of_mini_batches = routes or [None] * len(mini_batches)
            parts = [self.policy.score(*pair) for pair in zip(mini_batches, of_mini_batches, strict=True)]
            found["proximal_log_probs"] = np.concatenate(parts)
        if self.config.loss.kl.enabled:
            with self.policy.kept_weights(REFERENCE):
                found["reference_log_probs"] = self.policy.score(_flat(groups))
        return found

    def _train_on(
        self, batch: Batch, behavior_log_probs: np.ndarray, routes: list[Routes] | None, step: int
    ) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
        with self._timed("train"):
            groups = self._sequences(batch)
            other = self._other_log_probs(groups, routes)
            groups = with_log_probs(groups, behavior_log_probs=behavior_log_probs, **other)
            learning_rate = learning_rate_at(self.config.optimizer, step)
            parts, histograms = [], []
            self.changed = False
            for index, mini_batch in enumerate(self._mini_batches(groups)):
                seed = derive_seed(self.config.seed, "update", self.updates)
                result = self.policy.update(mini_batch, learning_rate, seed, routes[index] if routes else None)
                self.updates += 1
                self.changed |= result.applied and result.grad_norm * result.learning_rate > 0
                self._refuse_a_diverged_run(result, step)
                parts.append(result.metrics)
                histograms.append(result.histograms)
                if self.mesh.rank == 0:  # the same on all ranks: stated once
                    parts.append(
                        {
                            "optimizer/grad_norm": mean(result.grad_norm, 1),
                            "optimizer/learning_rate": largest(result.learning_rate),
                            "optimizer/skipped_updates": total(0.0 if result.applied else 1.0),
                        }
                    )
            of_ranks = self.mesh.from_all_ranks((merge(parts), merge_histograms(histograms)))
            metrics = merge([part for part, _ in of_ranks])
        if self.feed:
            self.feed.consumed(step, step)
        return metrics, merge_histograms([part for _, part in of_ranks])

    def _refuse_a_diverged_run(self, result: UpdateResult, step: int) -> None:
        """Raises ValueError at the third update in a row whose gradient is not finite: it will not get better."""
        self.broken_in_a_row = self.broken_in_a_row + 1 if result.skipped == "gradient not finite" else 0
        if self.broken_in_a_row < MOST_BROKEN_UPDATES:
            return
        metrics = values(merge(self.mesh.from_all_ranks(result.metrics)))
        names = self.policy.parameters_with_broken_gradient()
        raise ValueError(
            f"global step {step}, update {self.updates}: the gradient was not finite {self.broken_in_a_row} times in "
            f"a row. Loss {metrics['objective/loss']:.4g}, largest ratio {metrics['ratio/max']:.4g}, entropy "
            f"{metrics['policy/entropy']:.4g}; {len(names)} parameters have such gradients, first {names[:3]}. "
            "If the loss is not finite either, the weights or the log-probs are broken: go back to earlier weights and "
            "lower optimizer.learning_rate; if it is, the backward pass overflowed: look at those parameters"
        )

    def _publish(self, version: int, changed: bool) -> None:
        with self._timed("publish"):
            lease: PublishLease | None = None
            if self.feed:
                lease = self.feed.publish_begin(version)
            self.publisher.publish(lease, changed)
            if self.feed and self.report and lease:
                self.feed.publish_end(version)
                self.report.evaluations(lease.evaluations)

    def _write(
        self,
        step: int,
        batch: Batch,
        metrics: dict[str, Metric],
        histograms: dict[str, np.ndarray],
        spent: dict[str, float],
        step_s: float,
    ) -> None:
        if self.report:
            times = {f"time/{phase}_s": seconds for phase, seconds in spent.items()} | {"time/step_s": step_s}
            self.report.step(step, values(metrics | batch_metrics(batch, step)) | times, histograms, batch)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[phase] += time.monotonic() - start
