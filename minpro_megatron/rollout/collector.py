"""Delay mode's orchestration: which version samples what, when the trainer may publish, what it may consume.

The collector works through the versions 0 .. num_global_steps. Under version v it samples the batches that
`batches_of_version` gives to v, and evaluates v if that is due; all of it is started in this order and runs
together. Only when all of it has ended may version v + 1 be published, so no request ever spans two versions.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.evaluation.sampling import append_result, evaluate, evaluation_groups
from minpro_megatron.monitor.status import write_status
from minpro_megatron.records import (
    Batch,
    BehaviorLogProbs,
    CollectedGroup,
    CollectorTotals,
    EvaluationResult,
    IssuedGroup,
    PublishLease,
    ServerAddress,
)
from minpro_megatron.rollout.journal import Journal
from minpro_megatron.rollout.prompts import PromptStream, TokenizedPrompt
from minpro_megatron.rollout.staleness import (
    batches_of_version,
    evaluated_versions,
    expected_staleness,
    sampling_version,
    staleness,
)
from minpro_megatron.serving.client import LARGEST_LOG_PROB, SamplingParameters

log = logging.getLogger(__name__)

CollectGroup = Callable[[IssuedGroup, SamplingParameters], Awaitable[CollectedGroup]]


class Conflict(RuntimeError):
    """The trainer asked for something that the state of the run does not allow."""


class CollectorFailed(RuntimeError):
    """The collector has failed; the message is the failure's."""


class Collector:
    """The state of a run between the servers and the trainer.

    `run` is the work; the other coroutines are what the trainer asks for. Each of those raises Conflict for a
    request out of order and CollectorFailed once `run` has failed, also while it waits.
    """

    def __init__(
        self,
        config: RunConfig,
        journal: Journal,
        stream: PromptStream,
        heldout: Sequence[TokenizedPrompt],
        collect_group: CollectGroup,
        servers: Sequence[ServerAddress],
    ) -> None:
        self._config = config
        self._journal = journal
        self._stream = stream
        self._heldout = [(tokenized.prompt, tokenized.token_ids) for tokenized in heldout]
        self._collect_group = collect_group
        self._servers = list(servers)
        sampling = config.sampling
        self._training = SamplingParameters(sampling.temperature, sampling.max_response_tokens)
        self._evaluating = SamplingParameters(
            config.evaluation.temperature, sampling.max_response_tokens, config.evaluation.top_p
        )
        self._evaluated_versions = set(evaluated_versions(config.num_global_steps, config.evaluation.every_steps))
        self._changed = asyncio.Condition()
        self._version = 0  # what the servers hold
        self._version_ended = False  # all work under self._version has ended
        self._publishing = False
        self._next_step = 0
        self._batches: dict[int, Batch] = {}  # collected and not yet consumed
        self._scored: set[int] = set()
        self._evaluations: list[EvaluationResult] = []
        self._failure: str | None = None
        self._finished = False

    @property
    def _num_steps(self) -> int:
        return self._config.num_global_steps

    async def run(self) -> None:
        """All sampling and evaluation of the run; returns once the trainer has been told the totals.

        Raises what a group's sampling raised.
        """
        try:
            for version in range(self._num_steps + 1):
                await self._wait_until(lambda version=version: self._version == version)
                await self._work_under(version)
                await self._change(version_ended=True)
            await self._wait_until(lambda: self._finished)
        except ExceptionGroup as group:
            # The tasks of a batch fail together, most of them by being cancelled: one cause is enough.
            raise _first_error(group) from None

    async def fail(self, message: str) -> None:
        """Tells whoever waits, now or later, that there will be nothing more."""
        async with self._changed:
            self._failure = message
            self._changed.notify_all()

    async def _work_under(self, version: int) -> None:
        indices = batches_of_version(version, self._config.staleness.delay_steps, self._num_steps)
        evaluated = version in self._evaluated_versions
        work = [f"batch {index}" for index in indices] + ["evaluation"] * evaluated
        phase = f"version {version}: {', '.join(work) or 'nothing left to sample'}"
        issued = [self._stream.groups(index, version) for index in indices]
        await self._journal.issue([group for groups in issued for group in groups])
        # Tasks start in the order in which they are made, so the batches' groups queue for the servers in
        # order.
        async with asyncio.TaskGroup() as tasks:
            for index, groups in zip(indices, issued, strict=True):
                tasks.create_task(self._sample_batch(index, groups))
            if evaluated:
                tasks.create_task(self._evaluate(version))
            # In a thread: it waits for the disk.
            tasks.create_task(asyncio.to_thread(write_status, self._config.run_dir, "collect", phase))

    async def _sample_batch(self, index: int, issued: list[IssuedGroup]) -> None:
        start = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(self._collect(group, self._training)) for group in issued]
        batch = Batch(index=index, groups=[task.result() for task in pending])
        await self._journal.collect(batch)
        self._log_batch(batch, time.monotonic() - start)
        async with self._changed:
            self._batches[index] = batch
            self._changed.notify_all()

    async def _collect(self, group: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        return await self._collect_group(group, sampling)

    def _log_batch(self, batch: Batch, wall_time_s: float) -> None:
        responses = [response for group in batch.groups for response in group.responses]
        tokens = sum(len(response.token_ids) for response in responses)
        log.info(
            "batch %d sampled with version %d: %d groups, %d responses, %d tokens in %.2f s (%.0f tokens/s), "
            "mean reward %.4f",
            batch.index, batch.groups[0].issued.policy_version, len(batch.groups), len(responses), tokens,
            wall_time_s, tokens / wall_time_s, float(np.mean([response.reward for response in responses])),
        )  # fmt: skip

    async def _evaluate(self, version: int) -> None:
        config = self._config
        groups = evaluation_groups(self._heldout, config.evaluation.samples_per_prompt, config.seed, version)
        result = await evaluate(groups, lambda group: self._collect_group(group, self._evaluating))
        append_result(config.run_dir, result)
        await self._journal.evaluate(result)
        self._evaluations.append(result)
        log.info(
            "version %d evaluated: pass@1 %.4f +- %.4f over %d prompts x %d samples in %.2f s",
            version, result.pass_at_1, result.standard_error, result.num_prompts, result.samples_per_prompt,
            result.wall_time_s,
        )  # fmt: skip

    async def batch(self, index: int, timeout_s: float) -> Batch | None:
        """Batch `index`; None if it is not there within `timeout_s` seconds."""
        if not 0 <= index < self._num_steps:
            raise Conflict(f"batch {index}: the run has batches 0 .. {self._num_steps - 1}")
        if index < self._next_step:
            raise Conflict(f"batch {index}: it is consumed already")
        version = sampling_version(index, self._config.staleness.delay_steps)
        if version > self._version:  # waiting would never end: the trainer that waits is the one to publish
            raise Conflict(f"batch {index}: it is sampled with version {version}; the servers hold {self._version}")
        return self._batches[index] if await self._wait_until(lambda: index in self._batches, timeout_s) else None

    async def scored(self, scores: BehaviorLogProbs) -> None:
        """Stores a batch's behavior log-probs. Raises ValueError if they do not fit the batch."""
        self._raise_failure()
        batch = self._batches.get(scores.index)
        if batch is None:
            raise Conflict(f"scores of batch {scores.index}: it is not sampled yet, or consumed already")
        if scores.index in self._scored:
            raise Conflict(f"scores of batch {scores.index}: it is scored already, and scores never change")
        check_scores(batch, scores)
        await self._journal.score(batch, scores)
        self._scored.add(scores.index)

    async def consumed(self, step: int, policy_version: int) -> None:
        """Step `step`, begun with `policy_version`, has trained on its batch. Checks its staleness again."""
        self._raise_failure()
        if step != self._next_step or step not in self._batches:
            raise Conflict(f"step {step}: the next step to consume its batch is {self._next_step}")
        if step not in self._scored:
            raise Conflict(f"step {step}: its batch has no behavior log-probs; hand them in first")
        batch = self._batches[step]
        expected = expected_staleness(step, self._config.staleness.delay_steps)
        found = [staleness(policy_version, group.oldest_version) for group in batch.groups]
        for group, value in zip(batch.groups, found, strict=True):
            if value != expected:
                raise Conflict(
                    f"step {step}: group {group.issued.group_id}, sampled with version {group.oldest_version} "
                    f"and consumed with version {policy_version}: staleness {value} instead of {expected}"
                )
        await self._journal.consume(batch, step, found)
        del self._batches[step]
        self._scored.discard(step)
        await self._change(next_step=step + 1)

    async def publish_begin(self, version: int, timeout_s: float) -> PublishLease | None:
        """Permission to publish `version`; None if work under the one before it goes on past `timeout_s`."""
        if version != self._version + 1 or version > self._num_steps:
            raise Conflict(f"publish version {version}: the servers hold {self._version} of {self._num_steps}")
        if self._next_step != version:
            raise Conflict(f"publish version {version}: step {version - 1} has not consumed its batch")
        if not await self._wait_until(lambda: self._version_ended, timeout_s):
            return None
        self._publishing = True
        return PublishLease(version=version, servers=self._servers, evaluations=list(self._evaluations))

    async def publish_end(self, version: int) -> None:
        """The servers hold `version`: its work begins."""
        self._raise_failure()
        if not self._publishing or version != self._version + 1:
            raise Conflict(f"publish_end of version {version}: there is no lease for it")
        await self._journal.publish(version)
        await self._change(publishing=False, version=version, version_ended=False)

    async def finish(self, timeout_s: float) -> CollectorTotals | None:
        """The totals once the last version's evaluation has ended; None if that exceeds `timeout_s`."""
        if self._version != self._num_steps:
            raise Conflict(f"finish: version {self._version} of {self._num_steps} is published")
        return await self._journal.totals() if await self._wait_until(lambda: self._version_ended, timeout_s) else None

    async def totals_delivered(self) -> None:
        """Lets `run` return: the trainer has its answer."""
        await self._change(finished=True)

    async def _change(self, **changes: int | bool) -> None:
        async with self._changed:
            for name, value in changes.items():
                assert hasattr(self, f"_{name}"), name
                setattr(self, f"_{name}", value)
            self._changed.notify_all()

    async def _wait_until(self, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: ready() or self._failure is not None)
        except TimeoutError:
            return False
        self._raise_failure()
        return True

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise CollectorFailed(self._failure)


def check_scores(batch: Batch, scores: BehaviorLogProbs) -> None:
    """Raises ValueError unless the scores are one finite log-prob for each response token of the batch."""
    where = f"scores of batch {batch.index}"
    version = batch.groups[0].issued.policy_version
    if scores.policy_version != version:
        raise ValueError(f"{where}: computed with version {scores.policy_version}, sampled with version {version}")
    if len(scores.log_probs) != len(batch.groups):
        raise ValueError(f"{where}: {len(scores.log_probs)} groups instead of {len(batch.groups)}")
    for group, responses in zip(batch.groups, scores.log_probs, strict=True):
        name = f"{where}, group {group.issued.group_id}"
        if len(responses) != len(group.responses):
            raise ValueError(f"{name}: {len(responses)} responses instead of {len(group.responses)}")
        for place, (response, log_probs) in enumerate(zip(group.responses, responses, strict=True)):
            if log_probs.dtype != np.float32 or log_probs.shape != response.token_ids.shape:
                raise ValueError(
                    f"{name}, response {place}: {log_probs.dtype} of shape {log_probs.shape} instead of "
                    f"float32 of shape {response.token_ids.shape}"
                )
            if not np.isfinite(log_probs).all() or (log_probs > LARGEST_LOG_PROB).any():
                raise ValueError(f"{name}, response {place}: a value is not finite, or above 0")


def _first_error(group: ExceptionGroup) -> Exception:
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
