"""The graders of a run: functions in worker processes, and services, each for the sources that it is set for.

What fails is repeated: a function that computes once, in a new process; an async function and a service with growing
pauses until reward.deadline_s. A group that still has no grades gets none: the failure is not replaced by a reward,
because with rewards of -1 and +1 a 0 would be worth more than a wrong answer.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.records import Prompt
from minpro_megatron.rewards.async_pool import AsyncPool
from minpro_megatron.rewards.failures import MAX_LOGGED_FAILURES, FailureCounts
from minpro_megatron.rewards.forms import GroupToGrade, ResponseToGrade
from minpro_megatron.rewards.judging import GradingFailed, Judged, Judgement
from minpro_megatron.rewards.pool import RewardPool
from minpro_megatron.rewards.registry import HTTP, check_reward_name
from minpro_megatron.rewards.repeating import repeated

if TYPE_CHECKING:
    from minpro_megatron.rewards.services import RewardServices

log = logging.getLogger(__name__)

# Calls of an async function for one group. A service is asked until the deadline, but a function's error may be its
# own, and then it fails in the same way each time.
MAX_CALLS = 5


class SampledText(NamedTuple):
    """A response as a grader sees it. The text begins with the prompt's given prefix, if it has one."""

    text: str
    token_ids: np.ndarray
    finish_reason: str


class Graders:
    """The graders that `settings` name; use inside `async with`, which raises UserError for one that cannot be loaded.

    The constructor raises UserError for an unknown one.
    """

    def __init__(self, settings: RewardConfig) -> None:
        self._settings = settings
        check_reward_name(settings.function)
        for source, name in settings.by_source.items():
            check_reward_name(name, f"reward.by_source[{source!r}]")
        self._counts = FailureCounts()
        self._num_failed_attempts = 0
        self._room = asyncio.Semaphore(settings.concurrency)
        self._pool: RewardPool | None = None
        self._async_pool: AsyncPool | None = None
        self._services: RewardServices | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Graders":
        settings = self._settings
        async with AsyncExitStack() as stack:  # closes what has started if something else does not start
            if HTTP in settings.names:
                from minpro_megatron.rewards.services import RewardServices  # with aiohttp, half a second

                services = RewardServices(settings.urls, settings.attempt_timeout_s)
                self._services = await stack.enter_async_context(services)
            functions = [name for name in settings.names if name != HTTP]
            if functions:
                pool = RewardPool(functions, settings.workers, settings.timeout_s, counts=self._counts)
                self._pool = await stack.enter_async_context(pool)
                if asynchronous := [name for name in functions if pool.form(name) == "async"]:
                    processes = AsyncPool(asynchronous, settings.attempt_timeout_s)
                    self._async_pool = await stack.enter_async_context(processes)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def num_failed(self) -> int:
        """Responses without a reward because their grader failed."""
        return self._counts.num_failed

    @property
    def num_timed_out(self) -> int:
        """Responses without a reward because their grader exceeded its time."""
        return self._counts.num_timed_out

    def metrics(self) -> dict[str, float]:
        """Counts since the start, under the names that metrics.metric declares."""
        return self._counts.metrics() | {"reward/attempts_failed": float(self._num_failed_attempts)}

    async def judge(
        self, prompt: Prompt, responses: Sequence[SampledText], stop_at_failure: bool = False
    ) -> list[Judged]:
        """The judged responses to `prompt`, in order. With `stop_at_failure` the list may end at the first response
        that cannot be graded."""
        name = self._settings.by_source.get(prompt.source, self._settings.function)
        if name != HTTP:
            assert self._pool is not None, "use `async with` around the graders"
            if self._pool.form(name) == "response":
                texts = [response.text for response in responses]
                return await self._pool.judge_all(name, texts, prompt.answer, stop_at_failure)
        try:
            found = await self._judge_group(name, group_to_grade(prompt, responses))
        except GradingFailed as error:
            for response in responses:
                self._counts.count(str(error), error.timed_out, response.text, prompt.answer)
            return [Judged(None, problem=str(error)) for _ in responses]
        return [Judged(one.reward, one.extracted, one.seconds) for one in found]

    async def _judge_group(self, name: str, group: GroupToGrade) -> list[Judgement]:
        services, functions = self._services, self._async_pool
        if name == HTTP:
            assert services is not None
            async with self._room:
                return await repeated(
                    lambda left_s: services.judge(group, left_s), self._settings.deadline_s, self._attempt_failed
                )
        assert self._pool is not None
        if self._pool.form(name) == "group":
            return await self._pool.judge_group(name, group)
        assert functions is not None
        async with self._room:
            return await repeated(
                lambda left_s: functions.judge(name, group, left_s),
                self._settings.deadline_s,
                self._attempt_failed,
                MAX_CALLS,
            )

    def _attempt_failed(self, failure: GradingFailed) -> None:
        self._num_failed_attempts += 1
        total = self._num_failed_attempts
        if total <= MAX_LOGGED_FAILURES or total.bit_count() == 1:  # 8, 16, 32, ...
            log.warning("an attempt to grade a group failed (%d since the start): %s", total, failure)


def group_to_grade(prompt: Prompt, responses: Sequence[SampledText]) -> GroupToGrade:
    """The group as a function or a service receives it."""
    return GroupToGrade(
        id=prompt.id,
        source=prompt.source,
        prompt=prompt.text,
        answer=prompt.answer,
        prefix=prompt.prefix,
        metadata=prompt.metadata,
        responses=[
            ResponseToGrade(text=text, token_ids=token_ids.tolist(), finish_reason=finish_reason)
            for text, token_ids, finish_reason in responses
        ],
    )
