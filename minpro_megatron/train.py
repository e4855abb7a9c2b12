"""The training loop: fetch a batch, score it, train on it, publish the weights, save a checkpoint.

`StepOrder` defines the order. All ranks follow it together; only rank 0 sends requests to the collector and passes the
answers to the other ranks:

    collector --batch--> BatchScoring --behavior log-probs--> Updates --weights--> Publisher --version--> servers
                 |                                               |
                 rank 0 only                                     metrics --> StepReport;  states --> Saving
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minpro_megatron.actor import garbage
from minpro_megatron.actor.behavior import flat
from minpro_megatron.actor.kept_versions import KeptVersions
from minpro_megatron.actor.policy import Policy
from minpro_megatron.actor.scoring import BatchScoring, ScoredBatch
from minpro_megatron.actor.start_gate import refuse_broken_scores, refuse_different_models
from minpro_megatron.actor.updates import TrainedBatch, Updates
from minpro_megatron.batching.sequences import behavior_record, sampled_tokens, trained_step
from minpro_megatron.buffer.step_order import Fetch, Publish, Release, Save, StepOrder, Train, steps_ahead
from minpro_megatron.checkpoints.checkpoint_folder import score_of
from minpro_megatron.checkpoints.manifest import RunManifest, TrainerState
from minpro_megatron.checkpoints.run_checkpoints import RunCheckpoints
from minpro_megatron.checkpoints.save_schedule import SaveSchedule
from minpro_megatron.checkpoints.saving import Saving
from minpro_megatron.config.run import RunConfig
from minpro_megatron.feed.answers import answer_to, lease_for
from minpro_megatron.feed.batch_source import BatchSource
from minpro_megatron.metrics.metric import values
from minpro_megatron.monitor.alarms import Alarm
from minpro_megatron.monitor.phases import PhaseClock
from minpro_megatron.monitor.step_report import StepReport, batch_metrics
from minpro_megatron.monitor.trace import NoTracer, Tracer
from minpro_megatron.monitor.watchdog import Watchdog
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.publishing.publish import Publisher
from minpro_megatron.publishing.publish_report import PublishReport, publication_metrics
from minpro_megatron.publishing.turns import ServerTurns
from minpro_megatron.records import Batch, CollectorTotals, EvaluationResult, PublishLease

PHASES = ("wait_for_batch", "score", "train", "publish", "checkpoint", "monitor")
OF_TURNS = ("turn",)  # in addition, on GPUs that the servers share


@dataclass(frozen=True)
class RankZero:
    """The objects that only rank 0 of the trainer has."""

    feed: BatchSource
    report: StepReport
    save_schedule: SaveSchedule | None = None
    before_early_end: Callable[[int, str], None] = lambda version, reason: None  # called before the last save
    may_write: Callable[[], None] = lambda: None  # raises RunBlocked once this start does not own the run folder
    say: Callable[[str], None] = lambda phase: None  # shows what the trainer does


class Trainer:
    """One run of the trainer on this rank."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        policy: Policy,
        publisher: Publisher,
        checkpoints: RunCheckpoints,
        watchdog: Watchdog,
        rank_zero: RankZero | None = None,
        resumed_from: RunManifest | None = None,
        tracer: Tracer | None = None,
        turns: ServerTurns | None = None,
    ) -> None:
        """`resumed_from` is the checkpoint that this start resumes from. `rank_zero` is given only on rank 0. `turns`:
        the servers share the trainer's GPUs, and have released their memory before the policy was loaded."""
        self._config, self._mesh, self._policy = config, mesh, policy
        self._publisher, self._checkpoints, self._resumed_from = publisher, checkpoints, resumed_from
        self._feed = rank_zero.feed if rank_zero else None
        self._report = rank_zero.report if rank_zero else None
        self._may_write = rank_zero.may_write if rank_zero else lambda: None
        self._say = rank_zero.say if rank_zero else lambda phase: None
        self._turns = turns
        self._tracer = tracer or NoTracer()
        self._clock = PhaseClock(PHASES if turns is None else PHASES + OF_TURNS, self._tracer, watchdog)
        self._versions = KeptVersions(policy, config.staleness)
        self._scoring = BatchScoring(config, policy, self._versions)
        self._updates = Updates(config, mesh, policy)
        self._saving = Saving(config, mesh, policy, checkpoints, self._clock, self._feed)
        if rank_zero:
            self._saving.decide_with(rank_zero.save_schedule, rank_zero.before_early_end)
        self._scored: dict[int, ScoredBatch] = {}  # by batch: fetched but not trained on yet
        self._publications: list[PublishReport] = []  # of this step so far
        self._fleet: dict[str, float] = {}  # metrics of the last lease

    @property
    def updates(self) -> int:
        """Optimizer updates since the start of the run."""
        return self._updates.count

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that this start has spent in each phase."""
        return self._clock.seconds

    def run(self) -> CollectorTotals | None:
        """Trains all remaining global steps. Returns the collector's totals on rank 0, None on other ranks.

        If this start ends before the run, raises AlarmStop or EndedEarly on all ranks after a last checkpoint.
        """
        first = self._begin()
        ahead, in_turns = steps_ahead(self._config.staleness), self._config.server.takes_turns
        order = StepOrder(self._config.num_global_steps, ahead, first, in_turns)
        for fetch in order.before_first_step():
            self._fetch_and_score(fetch)
        self._clock.lap()
        self._say("training")
        self._saving.begin()
        with garbage.collected_together():
            for step in order.steps:
                self._tracer.step(step)
                self._step(order, step)
        return self._finish()

    def _begin(self) -> int:
        """Returns the first global step: 0, or that of the checkpoint, after its weights are loaded. They are
        published, also those of a new run where it `publishes_at_start`."""
        self._scoring.keep_reference()  # the initial weights, also if the run resumes from a checkpoint
        manifest = self._resumed_from
        if manifest is not None:
            self._say("loading the checkpoint")
            with self._clock.guard("loading the checkpoint"):
                applied = self._checkpoints.load(self._policy, manifest)
            self._updates.resume(manifest.updates, applied)
            self._versions.in_place = manifest.policy_version
        if self._feed:
            self._feed.start(self._versions.in_place)
        if manifest is not None or self._config.publishes_at_start:
            self._say(f"publishing version {self._versions.in_place}")
            self._publish(self._versions.in_place, changed=False)
        self._say("waiting for the first batch")
        return self._versions.in_place

    def _step(self, order: StepOrder, step: int) -> None:
        """One global step. The time to write its metrics and its checkpoint counts for the next step."""
        batch = trained = None
        for event in order.of_step(step):
            match event:
                case Release(version):
                    self._release(version)
                case Fetch():
                    self._fetch_and_score(event)
                case Train():
                    batch, trained = self._train(step)
                case Publish(version):
                    assert trained is not None
                    self._publish(version, trained.changed, ends_step=True)
                case Save(version):
                    assert batch is not None
                    assert trained is not None
                    alarms = self._write(step, batch, trained)
                    self._saving.after_step(self._state(version), alarms)

    def _release(self, version: int) -> None:
        """Takes the memory of the GPUs once the servers have done all work of `version`."""
        turns = self._turns
        assert turns is not None, "the order has turns"
        if not turns.is_trainers:  # as it is since before the model was loaded
            with self._clock.phase("wait_for_batch"):
                lease = turns.await_release(version, self._send)
            with self._clock.phase("turn", guarded=f"releasing the servers' memory for global step {version}"):
                turns.release(lease)
                self._policy.to_device()
        assert turns.lease is not None, "the servers have released their memory"
        self._note_evaluations(turns.lease.evaluations)
        self._fleet = turns.lease.metrics  # the step is reported before it publishes

    def _state(self, version: int) -> TrainerState:
        return TrainerState(
            policy_version=version,
            updates=self._updates.count,
            skipped_updates=self._updates.skipped,
            num_global_steps=self._config.num_global_steps,
        )

    def _fetch_and_score(self, fetch: Fetch) -> None:
        """Fetches the batch and computes its behavior log-probs under the same weights that sampled its tokens."""
        index = fetch.batch
        with self._clock.phase("wait_for_batch"):
            batch = answer_to(
                lambda: self._mesh.from_rank_0(self._feed.batch(index) if self._feed else None), self._send
            )
        with (
            self._versions.weights_of(fetch.version),
            self._clock.phase("score", guarded=f"scoring batch {index}"),
        ):
            scored = self._scoring.behavior(batch)
            sampled = sampled_tokens(batch)
            refuse_broken_scores(index, scored.log_probs[sampled])
            if index == 0:
                refuse_different_models(flat(scored.groups), scored.log_probs, sampled)
            if self._feed and not all(group.is_scored for group in batch.groups):
                version = fetch.version if self._config.staleness.mode == "delay" else -1
                self._feed.scored(behavior_record(batch, version, scored.log_probs))
        self._scored[index] = scored

    def _train(self, step: int) -> tuple[Batch, TrainedBatch]:
        scored = self._scored.pop(step)
        with self._clock.phase("train"):
            if self._turns is None:  # in turns nothing is scored with earlier weights
                self._versions.keep()
            with self._clock.guard(f"scoring for global step {step}"):
                mini_batches = self._scoring.complete(scored)
            trained = self._updates.run_step(step, mini_batches, scored.routes, self._clock.guard)
            self._versions.in_place = step + 1
        if self._feed:
            self._feed.consumed(trained_step(scored.batch, step, trained.log_probs))
        if self._report:
            self._report.trained(scored.log_probs, trained.log_probs)
        return scored.batch, trained

    def _publish(self, version: int, changed: bool, ends_step: bool = False) -> None:
        """Publishes the current weights as `version`; `changed`: updates have changed them since the last version."""
        self._may_write()
        with self._clock.phase("wait_for_batch"):  # in delay mode the servers first complete a batch
            lease = lease_for(
                version,
                lambda: self._mesh.from_rank_0(self._feed.publish_begin(version) if self._feed else None),
                self._send,
            )
        with self._clock.phase("publish"):
            report = self._transfer(lease, changed)
            if self._turns is not None and ends_step:
                self._write_publication(self._turns, lease)
            self._hand_over(lease, report)
            self._note_evaluations(lease.evaluations)

    def _send(self, lease: PublishLease) -> None:
        """Sends the lease's version, which servers have lost, to the lease's servers."""
        self._hand_over(lease, self._transfer(lease, changed=False))

    def _transfer(self, lease: PublishLease, changed: bool) -> PublishReport | None:
        """Gives the lease's version to the lease's servers. The report on rank 0."""
        servers, turns = lease.servers, self._turns
        if turns is not None:
            if not turns.is_trainers:  # servers that have restarted in their turn
                turns.release(lease)
                self._policy.to_device()
            lease = turns.within_reach(lease)
            self._policy.to_host(but_weights=True)
            turns.await_all_ranks()
        with self._clock.guard(f"publishing version {lease.version}"), self._versions.weights_of(lease.version):
            report = self._publisher.publish(lease if self._mesh.rank == 0 else None, changed)
        if report and servers:  # none when training on a journal
            self._publications.append(report)
            self._fleet = lease.metrics
        return report

    def _hand_over(self, lease: PublishLease, report: PublishReport | None) -> None:
        """Ends the lease: the servers sample with its version. On shared GPUs it is their turn."""
        turns = self._turns
        if turns is not None:
            self._policy.to_host()
            turns.returned()
        if self._feed and report:
            without = [server.index for server in lease.servers if server.index not in report.held_by]
            # on shared GPUs a server without the weights may also lack memory: it is restarted
            self._feed.publish_end(lease.version, report.held_by, report.late if turns is None else without)

    def _write_publication(self, turns: ServerTurns, lease: PublishLease) -> None:
        """On shared GPUs the step's metrics and its checkpoint come before its publication, whose metrics are added. If
        they raise an alarm that ends the run, the servers, which have no work yet, release their memory again, and the
        trainer takes it for its last checkpoint."""
        published, alarms = publication_metrics(self._publications), []
        self._publications.clear()
        if self._report:
            alarms = self._report.published(lease.version - 1, published)
        alarm = self._saving.alarm_to_stop_on(lease.version, alarms)
        if alarm is not None:
            turns.release(lease)
            self._policy.to_device()
            self._saving.stop(self._state(lease.version), alarm)

    def _note_evaluations(self, results: Sequence[EvaluationResult]) -> None:
        """Takes note of all evaluations so far."""
        self._note_scores(results)
        if self._report:
            self._report.evaluations(results)

    def _note_scores(self, results: Sequence[EvaluationResult]) -> None:
        """Stores the scores of held-out evaluations, which decide which checkpoints are the best."""
        for result in results:
            if not result.benchmark:
                self._checkpoints.note_score(result.policy_version, score_of(result, self._config.checkpoint))

    def _write(self, step: int, batch: Batch, trained: TrainedBatch) -> list[Alarm]:
        """Writes the metrics of the step. Returns the alarms that the step raises, on rank 0."""
        lap = self._clock.lap()
        if self._report is None:
            return []
        with self._clock.phase("monitor"):
            times = {f"time/{phase}_s": seconds for phase, seconds in lap.phases.items()} | {"time/step_s": lap.total}
            published = dict(self._fleet)
            if self._turns is None:
                published |= publication_metrics(self._publications)
                self._publications.clear()
            of_batch = batch_metrics(batch, step, self._config.reward.right_reward)
            scalars = values(trained.metrics | of_batch) | times | published
            return self._report.step(step, scalars, trained.histograms, batch)

    def _finish(self) -> CollectorTotals | None:
        self._say("waiting for the last evaluations")
        totals = answer_to(lambda: self._mesh.from_rank_0(self._feed.finish() if self._feed else None), self._send)
        self._note_scores(totals.evaluations)
        if self._report:
            self._report.finished(totals)
        if self._turns is not None:  # the weights are yet to be exported
            self._turns.ended()
            self._policy.to_device()
        return totals if self._feed else None
