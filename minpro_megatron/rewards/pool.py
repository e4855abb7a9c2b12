"""Grading in worker processes under hard limits of time and memory: model output is untrusted, graders hang on it."""

import asyncio
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from minpro_megatron.rewards.registry import check_reward_name
from minpro_megatron.rewards.worker import LENGTH, Judgement

log = logging.getLogger(__name__)

WORKER_MODULE = "minpro_megatron.rewards.worker"
START_TIMEOUT_S = 120.0
# For an answer that came in time while the event loop was busy with something else: it is there, and not read yet.
GRACE_S = 0.05
# A symbolic checker can be led into expanding an expression without end; its process ends before the
# machine does. With its libraries a worker needs 0.2 GiB.
MEMORY_LIMIT_BYTES = 4 * 2**30
# A worker ends itself this much later than it should have been killed, if there is nobody left to do so.
ORPHAN_FACTOR = 3.0


class RewardWorkerError(RuntimeError):
    """A grading process does not start at all: a fault of the installation, not of a response."""


@dataclass(frozen=True)
class Judged:
    """A response's reward, what of it was compared, the grader's time, and what went wrong (then the reward is 0)."""

    reward: float
    extracted: str | None = None
    seconds: float | None = None
    problem: str | None = None


class _Worker:
    """One grading process; started when it is first needed, and again after it was killed."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        if self._process is not None:
            return
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            refusal = await asyncio.wait_for(self._read(), START_TIMEOUT_S)
        except (TimeoutError, asyncio.IncompleteReadError):
            await self.kill()
            raise RewardWorkerError(
                f"the grading process did not start: {' '.join(self._command)}; its error stands above"
            ) from None
        if refusal:
            await self.kill()
            raise ValueError(refusal.decode())

    async def grade_some(
        self, reward: str, texts: Sequence[str], answer: str, timeout_s: float
    ) -> list[Judgement | str | None]:
        """The results of `texts` up to the first that hangs or kills the grader, which is None and the last.

        Others are judgements, or a text saying what the grader raised. The time limit holds for each response.
        """
        await self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        results: list[Judgement | str | None] = []
        try:
            # All at once: a round trip between two processes for each response would cost more than most
            # graders.
            for text in texts:
                request = msgspec.msgpack.encode((reward, text, answer))
                self._process.stdin.write(LENGTH.pack(len(request)) + request)
            while len(results) < len(texts):
                body = await self._read_within(timeout_s)
                results.append(msgspec.msgpack.decode(body, type=Judgement | str))
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            await self.kill()
            results.append(None)
        except asyncio.CancelledError:
            await self.kill()  # its answers would be taken for those of the next responses
            raise
        return results

    async def _read_within(self, timeout_s: float) -> bytes:
        """Raises TimeoutError if the grader is late; not if only this process is, and the answer is there."""
        reading = asyncio.create_task(self._read())
        try:
            done, _ = await asyncio.wait({reading}, timeout=timeout_s)
            if not done:
                done, _ = await asyncio.wait({reading}, timeout=GRACE_S)
            if not done:
                raise TimeoutError
            return reading.result()
        finally:
            reading.cancel()

    async def _read(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
        return await self._process.stdout.readexactly(length)

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class RewardPool:
    """`num_workers` grading processes; use inside `async with`. Failures are counted and give the reward 0.

    `num_killed` counts responses whose grader hung or died, `num_errors` those whose grader raised.
    """

    def __init__(
        self,
        reward: str,
        num_workers: int,
        timeout_s: float,
        by_source: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        """`reward` grades the prompts of all sources that `by_source` does not give another one.

        `command` replaces the worker's command line, in tests. Raises ValueError for an unknown reward; one that
        cannot be imported raises it on entering.
        """
        self._default, self._by_source = reward, dict(by_source or {})
        check_reward_name(reward)
        for source, name in self._by_source.items():
            check_reward_name(name, f"collector.reward_by_source[{source!r}]")
        if command is None:
            limits = [str(MEMORY_LIMIT_BYTES), str(ORPHAN_FACTOR * timeout_s)]
            names = sorted({reward, *self._by_source.values()})
            command = [sys.executable, "-m", WORKER_MODULE, *limits, *names]
        self._timeout_s = timeout_s
        self._workers = [_Worker(command) for _ in range(num_workers)]
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self.num_killed = 0
        self.num_errors = 0

    async def __aenter__(self) -> "RewardPool":
        # The first one is started now: a worker that cannot start should be known before anything is sampled.
        await self._workers[0].start()
        for worker in self._workers:
            self._idle.put_nowait(worker)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(worker.kill() for worker in self._workers))

    async def grade_all(self, texts: Sequence[str], answer: str, source: str) -> list[float]:
        """The rewards of the responses to one prompt of `source`, in order."""
        return [judged.reward for judged in await self.judge_all(texts, answer, source)]

    async def judge_all(self, texts: Sequence[str], answer: str, source: str) -> list[Judged]:
        """The same with what each reward comes from, for audits."""
        reward = self._by_source.get(source, self._default)
        worker = await self._idle.get()
        results: list[Judgement | str | None] = []
        try:
            while len(results) < len(texts):
                results += await worker.grade_some(reward, texts[len(results) :], answer, self._timeout_s)
        finally:
            self._idle.put_nowait(worker)
        return [self._judged(text, answer, result) for text, result in zip(texts, results, strict=True)]

    def _judged(self, text: str, answer: str, result: Judgement | str | None) -> Judged:
        if isinstance(result, Judgement) and math.isfinite(result.reward):
            return Judged(result.reward, result.extracted, result.seconds)
        if result is None:
            self.num_killed += 1
            problem = f"grader died or exceeded collector.reward_timeout_s = {self._timeout_s:g} s"
        else:
            self.num_errors += 1
            problem = f"grader failed: {result if isinstance(result, str) else f'reward {result.reward}'}"
        log.warning("reward 0 for %r against %r: %s", text[-200:], answer[:200], problem)
        return Judged(0.0, problem=problem)
