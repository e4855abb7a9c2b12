"""The state of a run between the servers and the trainer: what is sampled, what is consumed, when weights change.

A schedule (buffer/schedule.py) decides what may happen when. The collector starts what may start, records it in the
journal, and answers the trainer. Evaluations run concurrently with the groups; weights do not change during one.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

import msgspec

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.schedule import make_schedule
from minpro_megatron.buffer.scores import check_scores, check_trained, with_scores
from minpro_megatron.buffer.staleness import RUN_START, Beginning
from minpro_megatron.collector.changes import CollectorFailed, StateChanges
from minpro_megatron.collector.consumption import checked_staleness, log_batch
from minpro_megatron.collector.events import CollectorObserver
from minpro_megatron.collector.grading_watch import GradingWatch
from minpro_megatron.collector.group_filter import GroupFilter
from minpro_megatron.collector.late_servers import LateServers
from minpro_megatron.collector.leases import Conflict, Leases, Servers
from minpro_megatron.collector.restoring import restore_state
from minpro_megatron.collector.retention import JournalRetention
from minpro_megatron.config.publish import NUM_CANARY_PROMPTS
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import first_error
from minpro_megatron.evaluation.in_run import CollectGroup, Evaluations, EvaluationSet, heldout_set
from minpro_megatron.evaluation.sampling import append_result, write_results
from minpro_megatron.fleet.fleet import start_limit_s
from minpro_megatron.monitor.status import write_status
from minpro_megatron.prompts.prompts import PromptStream, TokenizedPrompt
from minpro_megatron.records import (
    Batch,
    BehaviorLogProbs,
    CollectedGroup,
    CollectorTotals,
    EvaluationResult,
    IssuedGroup,
    PublishLease,
    TrainedStep,
)
from minpro_megatron.serving.client import SamplingParameters

log = logging.getLogger(__name__)

# How often a waiting request checks whether a server has restarted without the current weights.
SERVER_CHECK_INTERVAL_S = 0.5
# The run ends if for this multiple of server.start_timeout_s no server has held the current weights, or has answered
# before they are published.
SERVERLESS_FACTOR = 3


class Collector:
    """`run` does the work; the other coroutines serve the trainer's requests. Each of those raises Conflict for a
    request out of order, and CollectorFailed once `run` has failed, also while it waits."""

    def __init__(
        self,
        config: RunConfig,
        journal: Journal,
        stream: PromptStream,
        heldout: Sequence[TokenizedPrompt],
        collect_group: CollectGroup,
        servers: Servers,
        benchmarks: Sequence[EvaluationSet] = (),
        grading_metrics: Callable[[], Mapping[str, float]] = dict,
        observer: CollectorObserver | None = None,
    ) -> None:
        self._config = config
        self._observer = observer or CollectorObserver()
        self._journal = journal
        self._stream = stream
        self._collect_group = collect_group
        self._filter = GroupFilter(config)
        self._grading = GradingWatch(config.batch.num_prompts)
        self._grading_metrics = grading_metrics
        sampling = config.sampling
        # evaluations get no routes and no kept ids: they are not trained on, and both may far exceed the tokens
        self._training = SamplingParameters(
            sampling.temperature,
            sampling.max_response_tokens,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            with_supports=sampling.top_k > 0,
            with_routes=config.model.routing_replay == "rollout",
        )
        self._evaluations = Evaluations(config, [heldout_set(config, heldout), *benchmarks], collect_group)
        canaries = [prompt.token_ids.tolist() for prompt in heldout[:NUM_CANARY_PROMPTS]]
        late_servers = LateServers(start_limit_s(config.server)) if config.server.takes_turns else None
        self._leases = Leases(servers, canaries, self._evaluations, self._metrics, late_servers)
        self._changes = StateChanges()
        self._writing_status = asyncio.Lock()
        self._beginnings: Sequence[Beginning] = (RUN_START,)
        self._schedule = make_schedule(config)
        self._serving = not config.publishes_at_start  # servers hold the schedule's version
        self._next_step = 0
        self._groups: dict[int, CollectedGroup] = {}  # accepted and not yet consumed, by id
        self._retention = JournalRetention(config, journal, self.fail)
        self._finished = False

    @property
    def _num_steps(self) -> int:
        return self._config.num_global_steps

    @property
    def _version(self) -> int:
        return self._schedule.version

    async def restore(self, version: int, former_end: int | None = None) -> None:
        """Resumes from the checkpoint of `version` (0: the start) with the contents of the journal. Call it before
        `run`. `former_end` is the number of global steps that the run had when that checkpoint was saved.

        Raises JournalError if journal and checkpoint do not belong together, UserError if the prompts have changed.
        """
        restored = await restore_state(self._config, self._journal, self._stream, version, former_end)
        self._groups, self._beginnings, self._schedule = restored.groups, restored.beginnings, restored.schedule
        self._next_step = self._retention.resumed_from = version
        # the servers start from the initial weights
        self._serving = version == 0 and not self._config.publishes_at_start
        self._evaluations.results = await self._journal.evaluations()
        write_results(self._config.run_dir, self._evaluations.results)
        if restored.num_groups or version:
            ready = len(self._groups)
            to_repeat = restored.num_groups - ready
            log.info("resumes at global step %d: %d groups ready, %d to repeat", version, ready, to_repeat)
        self._observer.resumed(version)

    async def run(self) -> None:
        """All sampling and evaluation of the run. Returns once the trainer has received the totals.

        Raises the error of a group's sampling.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                while not self._finished:
                    seen = self._changes.count
                    if self._serving:
                        await self._start_what_may_start(tasks)
                    await self._changes.after(seen)
        except ExceptionGroup as group:
            # Tasks fail together, most of them because they are cancelled: one cause is enough.
            raise first_error(group) from None

    async def fail(self, message: str) -> None:
        """Reports the failure to all waiting requests, now and later."""
        await self._changes.fail(message)

    async def _start_what_may_start(self, tasks: asyncio.TaskGroup) -> None:
        version = self._version
        slots = self._schedule.to_issue()
        if not self._evaluations.under_way and (due := self._evaluations.due(version)):
            self._evaluations.under_way = True
            tasks.create_task(self._evaluate_all(due, version))
        if slots:
            issued = [self._stream.group(*slot) for slot in slots]
            await self._journal.issue(issued)
            # Tasks start in the order in which they are created, so groups queue for the servers in order of issue.
            for group in issued:
                tasks.create_task(self._sample(group))
            phase = f"version {version}: groups {slots[0].group_id} to {slots[-1].group_id}"
            tasks.create_task(self._write_status(phase))

    async def _write_status(self, phase: str) -> None:
        """In a thread, because it waits for the disk, and one at a time, because all write the same file."""
        async with self._writing_status:
            try:
                await asyncio.to_thread(write_status, self._config.run_dir, "collect", phase)
            except OSError as error:  # only the display reads it
                log.warning("the status cannot be written: %s", error)

    async def _sample(self, issued: IssuedGroup) -> None:
        group = await self._collect_group(issued, self._training)
        # Before anything is awaited: the journal takes longer for a graded group, and groups without grades that end
        # after it would be counted before it.
        self._grading.collected(group)
        accepted = self._filter.keeps(group)
        group = await self._journal.collect(group, accepted)
        async with self._changes.making():
            self._schedule.collected(issued.group_id, accepted)
            if accepted:
                self._groups[issued.group_id] = group

    def _metrics(self) -> dict[str, float]:
        return {**self._grading_metrics(), "reward/groups_not_graded": float(self._grading.num_groups)}

    async def _evaluate_all(self, due: Sequence[EvaluationSet], version: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for chosen in due:
                tasks.create_task(self._evaluate(chosen, version))
        async with self._changes.making():
            self._evaluations.under_way = False

    async def _evaluate(self, chosen: EvaluationSet, version: int) -> None:
        self._observer.evaluation_started(version, chosen.name)
        result = await self._evaluations.evaluate(chosen, version)
        if result is not None:
            await self._record_evaluation(result)
        self._observer.evaluation_ended(version, chosen.name)

    async def _record_evaluation(self, result: EvaluationResult) -> None:
        await self._journal.evaluate(result)  # first: it rejects what a start other than the newest one writes
        append_result(self._config.run_dir, result)
        log.info(
            "version %d evaluated%s: pass@1 %.4f +- %.4f, mean reward %.4f over %d prompts x %d samples in %.2f s",
            result.policy_version, f" on {result.benchmark}" if result.benchmark else "", result.pass_at_1,
            result.standard_error, result.mean_reward, result.num_prompts, result.samples_per_prompt,
            result.wall_time_s,
        )  # fmt: skip
        self._evaluations.results.append(result)

    def start(self, version: int) -> None:
        """The trainer starts with the weights of `version`; both must resume from the same checkpoint."""
        self._changes.raise_failure()
        if version != self._next_step:
            raise Conflict(f"the trainer resumes from version {version}, the collector from {self._next_step}")

    async def batch(self, index: int, timeout_s: float) -> Batch | PublishLease | None:
        """Batch `index`; None if it is not ready within `timeout_s` seconds. A lease is returned if a server has
        restarted without the current weights; publish them to it and ask again."""
        if not 0 <= index < self._num_steps:
            raise Conflict(f"batch {index}: the run has batches 0 .. {self._num_steps - 1}")
        if index < self._next_step:
            raise Conflict(f"batch {index}: it is consumed already")
        if not self._schedule.is_sampled_by_now(index):  # the trainer would wait for its own publication
            raise Conflict(f"batch {index}: later weights sample it; the servers hold version {self._version}")
        if not await self._wait_until(lambda: self._schedule.batch(index) is not None, timeout_s):
            return self._leases.current
        return self._batch(index)

    def _batch(self, index: int) -> Batch:
        chosen = self._schedule.batch(index)
        assert chosen is not None
        return Batch(index=index, groups=[self._groups[group_id].without_metadata() for group_id in chosen.group_ids])

    async def scored(self, scores: BehaviorLogProbs) -> None:
        """Stores a batch's behavior log-probs. Raises WrongScores if they do not fit the batch."""
        self._changes.raise_failure()
        index = scores.index
        if index < self._next_step or not self._schedule.is_sampled_by_now(index) or not self._schedule.batch(index):
            raise Conflict(f"scores of batch {index}: it is not sampled yet, or consumed already")
        batch = self._batch(index)
        await asyncio.to_thread(check_scores, batch, scores)  # it checks every token
        # some may have been scored before a crash: scores never change
        pairs = [pair for pair in zip(batch.groups, scores.log_probs, strict=True) if not pair[0].is_scored]
        if not pairs:
            raise Conflict(f"scores of batch {index}: it is scored already, and scores never change")
        await self._journal.score(index, pairs)
        for group, log_probs in pairs:
            self._groups[group.issued.group_id] = with_scores(group, log_probs)

    async def consumed(self, trained: TrainedStep) -> None:
        """Records that a step has trained on its batch. Checks the batch's staleness again."""
        self._changes.raise_failure()
        step, policy_version = trained.step, trained.policy_version
        chosen = self._schedule.batch(step)
        if step != self._next_step or chosen is None:
            raise Conflict(f"step {step}: the next step to consume its batch is {self._next_step}")
        batch = self._batch(step)
        if not all(group.is_scored for group in batch.groups):
            raise Conflict(f"step {step}: its batch has no behavior log-probs; send them first")
        check_trained(batch, trained)
        found = checked_staleness(self._config, self._beginnings, batch, policy_version)
        await self._journal.consume(batch, found, chosen.surplus, trained.log_probs)
        for group_id in [*chosen.group_ids, *chosen.surplus]:
            del self._groups[group_id]
        log_batch(batch)
        async with self._changes.making():
            self._schedule.consumed(step)
            self._next_step = step + 1
        self._retention.consumed(self._next_step)

    async def release_begin(self, version: int, timeout_s: float) -> PublishLease | None:
        """Shared GPUs: permission to release the servers' memory, because all work of `version` has ended; None if it
        continues past `timeout_s`. It is the lease of the version that the servers receive afterwards: the next one, or
        `version` itself if the trainer resumes from it. One for servers that have lost `version` may come first."""
        if version != self._version:
            raise Conflict(f"release for version {version}: the servers hold version {self._version}")
        following = version + 1 if self._serving else version
        if following > self._num_steps:
            raise Conflict(f"release for version {version}: the run ends with it")
        if lease := self._leases.released_already(following):
            return lease

        def may_release() -> bool:
            return not self._evaluations.due(version) and self._may_publish() and self._leases.may_turn_end()

        if await self._wait_until(may_release if self._serving else self._leases.can_grant, timeout_s):
            self._leases.grant(following, requests_in_flight=False, releases=True)
        return self._leases.current

    async def released(self, version: int, servers: Sequence[int]) -> None:
        """The servers of these indices have released their memory for the lease of `version`. Returns once the others
        have no process, so that the trainer may use the memory."""
        self._changes.raise_failure()
        await self._leases.keep_only(version, servers)

    async def publish_begin(self, version: int, timeout_s: float) -> PublishLease | None:
        """Permission to publish `version`; None if work under the previous version continues past `timeout_s`. A lease
        of the previous version may be returned first: publish that one to restarted servers, and ask again."""
        self._observer.lease_requested(version)
        expected = self._version + 1 if self._serving else self._version
        if version != expected or version > self._num_steps:
            raise Conflict(f"publish version {version}: the next one is {expected} of {self._num_steps}")
        if self._next_step != version:
            raise Conflict(f"publish version {version}: step {version - 1} has not consumed its batch")
        if lease := self._leases.released_already(version):
            self._observer.lease_granted(version)
            return lease
        # at the start the servers hold the initial weights, and nothing is in flight on them
        if await self._wait_until(self._may_publish if self._serving else self._leases.can_grant, timeout_s):
            in_flight = self._serving and self._config.staleness.mode == "bounded"
            self._leases.grant(version, in_flight)
            self._observer.lease_granted(version)
        return self._leases.current

    def _may_publish(self) -> bool:
        return not self._evaluations.under_way and self._schedule.may_publish() and self._leases.can_grant()

    async def publish_end(self, version: int, held_by: Sequence[int], late: Sequence[int] = ()) -> None:
        """The servers of the indices `held_by` hold `version`. The others get no work until they hold it too. Servers
        that were `late` with an answer are restarted."""
        self._changes.raise_failure()
        self._leases.check_end(version)
        first_time = version != self._version or not self._serving
        if first_time and version:  # no step has made version 0
            await self._journal.publish(version)
        await self._leases.let_start()
        self._leases.end(held_by, first_time, late)
        async with self._changes.making():
            if version != self._version:
                self._schedule.published()
            self._serving = True
        self._observer.published(version, held_by)

    def _republish_due(self) -> bool:
        """Whether a server waits for the current weights; if so, there is a lease for it."""
        # bounded mode: a server that was silent for a moment may have kept its requests
        in_flight = self._config.staleness.mode == "bounded"
        due = self._serving and self._leases.grant_again(self._version, in_flight)
        if due:
            self._observer.lease_granted(self._version)
        return due

    async def checkpoint_begin(self, version: int) -> None:
        """Returns when the journal would survive a power cut, because the checkpoint of `version` will rely on it."""
        self._changes.raise_failure()
        if version != self._next_step:
            raise Conflict(f"checkpoint of version {version}: {self._next_step} steps have consumed their batches")
        self._retention.checkpoint_begun(version)
        await self._journal.flush()

    async def checkpoint_end(self, version: int) -> None:
        """The checkpoint of `version` is complete: groups that earlier steps consumed are not needed to resume."""
        self._changes.raise_failure()
        self._retention.checkpoint_complete(version, self._next_step)

    async def finish(self, timeout_s: float) -> CollectorTotals | PublishLease | None:
        """The totals once the last version's evaluation has ended; None if that takes longer than `timeout_s`. A lease
        may be returned first, as from `batch`. On shared GPUs no server has a process any more."""
        if self._version != self._num_steps or not self._serving:
            raise Conflict(f"finish: version {self._version} of {self._num_steps} is published")

        def evaluated() -> bool:
            return not self._evaluations.due(self._num_steps)

        if not await self._wait_until(evaluated, timeout_s):
            return self._leases.current
        await self._leases.end_servers()
        totals = await self._journal.totals()
        return msgspec.structs.replace(totals, failed_evaluations=self._evaluations.num_failed)

    async def totals_delivered(self) -> None:
        """Lets `run` return: the trainer has its answer."""
        async with self._changes.making():
            self._finished = True

    async def _wait_until(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """True once `ready`; False after `timeout_s`, or when a current lease must be published first."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            self._changes.raise_failure()
            if ready():
                return True
            self._refuse_to_wait_for_ever()
            left_s = deadline - asyncio.get_running_loop().time()
            if self._republish_due() or left_s <= 0:
                return False
            await self._changes.next(min(left_s, SERVER_CHECK_INTERVAL_S))

    def _refuse_to_wait_for_ever(self) -> None:
        limit_s = SERVERLESS_FACTOR * self._config.server.start_timeout_s
        if self._leases.serverless_s(self._serving) > limit_s:
            limit = f"for {limit_s:g} s ({SERVERLESS_FACTOR} x server.start_timeout_s)"
            if self._serving:
                found = f"no server has held version {self._version} {limit}, so nothing can be sampled"
            else:
                found = f"no server has answered {limit}, so version {self._version} is not published"
            raise CollectorFailed(f"{found}; see the logs of serve and train")
