"""Grading in worker processes under a hard time limit: model output is untrusted, a grader may hang on it."""

import asyncio
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from minpro_megatron.rewards.registry import check_reward_name
from minpro_megatron.rewards.worker import LENGTH

log = logging.getLogger(__name__)

WORKER_MODULE = "minpro_megatron.rewards.worker"
START_TIMEOUT_S = 120.0
# A symbolic checker can be led into expanding an expression without end; its process ends before the
# machine does.
MEMORY_LIMIT_BYTES = 8 * 2**30


class RewardWorkerError(RuntimeError):
    """A grading process does not start at all: a fault of the installation, not of a response."""


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
            await asyncio.wait_for(self._read(), START_TIMEOUT_S)
        except (TimeoutError, asyncio.IncompleteReadError):
            await self.kill()
            raise RewardWorkerError(
                f"the grading process did not start: {' '.join(self._command)}; its error stands above"
            ) from None

    async def grade_some(self, texts: Sequence[str], answer: str, timeout_s: float) -> list[float | str | None]:
        """The results of `texts` up to the first that hangs or kills the grader, which is None and the last.

        Others are the reward, or a text saying what the grader raised. The time limit holds for each
        response.
        """
        await self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        results: list[float | str | None] = []
        try:
            # All at once: a round trip between two processes for each response would cost more than most
            # graders.
            for text in texts:
                request = msgspec.msgpack.encode((text, answer))
                self._process.stdin.write(LENGTH.pack(len(request)) + request)
            while len(results) < len(texts):
                body = await asyncio.wait_for(self._read(), timeout_s)
                results.append(msgspec.msgpack.decode(body, type=float | str))
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            await self.kill()
            results.append(None)
        except asyncio.CancelledError:
            await self.kill()  # its answers would be taken for those of the next responses
            raise
        return results

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

    def __init__(self, reward: str, num_workers: int, timeout_s: float, command: Sequence[str] | None = None) -> None:
        """`command` replaces the worker's command line, in tests. Raises ValueError for an unknown reward."""
        if command is None:
            check_reward_name(reward)
            command = [sys.executable, "-m", WORKER_MODULE, reward, str(MEMORY_LIMIT_BYTES)]
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

    async def grade_all(self, texts: Sequence[str], answer: str) -> list[float]:
        """The rewards of one prompt's responses, in order."""
        worker = await self._idle.get()
        results: list[float | str | None] = []
        try:
            while len(results) < len(texts):
                results += await worker.grade_some(texts[len(results) :], answer, self._timeout_s)
        finally:
            self._idle.put_nowait(worker)
        return [self._reward(text, answer, result) for text, result in zip(texts, results, strict=True)]

    def _reward(self, text: str, answer: str, result: float | str | None) -> float:
        if isinstance(result, float) and math.isfinite(result):
            return result
        if result is None:
            self.num_killed += 1
            problem = f"grader died or exceeded collector.reward_timeout_s = {self._timeout_s:g} s"
        else:
            self.num_errors += 1
            problem = f"grader failed: {result}"
        log.warning("reward 0 for %r against %r: %s", text[:200], answer[:200], problem)
        return 0.0
