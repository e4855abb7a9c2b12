"""Grades with async functions: all groups at the same time in one process of their own."""

import asyncio
import itertools
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from minpro_megatron.errors import UserError
from minpro_megatron.pipe_messages import framed, next_message
from minpro_megatron.rewards.async_worker import AsyncRequest, AsyncResult
from minpro_megatron.rewards.forms import GroupToGrade
from minpro_megatron.rewards.judging import GradingFailed, Judgement
from minpro_megatron.rewards.pool import MEMORY_LIMIT_BYTES, START_TIMEOUT_S, RewardWorkerError

WORKER_MODULE = "minpro_megatron.rewards.async_worker"


# A process that has not awaited anything for this long ends itself.
BLOCKED_S = 60.0


def async_worker_command(names: Sequence[str], attempt_timeout_s: float, blocked_s: float = BLOCKED_S) -> list[str]:
    """The command line of a process that grades with the async rewards `names`."""
    limits = [MEMORY_LIMIT_BYTES, attempt_timeout_s, blocked_s]
    return [sys.executable, "-m", WORKER_MODULE, *map(str, limits), *names]


class _Process:
    """A running process, and the groups that it has not answered."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.waiting: dict[int, asyncio.Future[AsyncResult]] = {}
        self.reading = asyncio.create_task(self._read_results())

    async def _read_results(self) -> None:
        try:
            while True:
                result = msgspec.msgpack.decode(await _next_message(self.process), type=AsyncResult)
                if (future := self.waiting.pop(result.number, None)) is not None and not future.done():
                    future.set_result(result)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            with suppress(ProcessLookupError):
                self.process.kill()
            status = await self.process.wait()
            if status == -signal.SIGALRM:
                problem = "the grader did not await anything for too long"
            else:
                problem = f"the grader's process ended with exit status {status}"
            for future in self.waiting.values():
                if not future.done():
                    future.set_exception(GradingFailed(problem))
            self.waiting.clear()


async def _next_message(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await next_message(process.stdout)


class AsyncPool:
    """The process of the async rewards `names`; use inside `async with`. It is started for the first group, and again
    after it has ended."""

    def __init__(self, names: Sequence[str], attempt_timeout_s: float, blocked_s: float = BLOCKED_S) -> None:
        self._command = async_worker_command(names, attempt_timeout_s, blocked_s)
        self._numbers = itertools.count()
        self._running: _Process | None = None
        self._starting = asyncio.Lock()

    async def __aenter__(self) -> "AsyncPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._running is not None:
            self._running.reading.cancel()
            with suppress(ProcessLookupError):
                self._running.process.kill()
            await self._running.process.wait()

    async def judge(self, reward: str, group: GroupToGrade, within_s: float) -> list[Judgement]:
        """The judgements of a group's responses, from one call of the function. Raises GradingFailed, at the latest
        after `within_s` seconds."""
        running = await self._process()
        number = next(self._numbers)
        future = running.waiting[number] = asyncio.get_running_loop().create_future()
        body = msgspec.msgpack.encode(AsyncRequest(number, reward, group))
        assert running.process.stdin is not None
        try:
            running.process.stdin.write(framed(body))
            async with asyncio.timeout(within_s):
                await running.process.stdin.drain()
                answer = await future
        except TimeoutError:
            raise GradingFailed("no result within reward.deadline_s", timed_out=True) from None
        except ConnectionError:
            raise GradingFailed("the grader's process has ended") from None
        finally:
            running.waiting.pop(number, None)
        if isinstance(answer.result, str):
            raise GradingFailed(f"grader failed: {answer.result}", answer.timed_out)
        return answer.result

    async def _process(self) -> _Process:
        async with self._starting:
            if self._running is None or self._running.reading.done():
                self._running = _Process(await self._started())
            return self._running

    async def _started(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            ready = msgspec.msgpack.decode(await asyncio.wait_for(_next_message(process), START_TIMEOUT_S))
        except (TimeoutError, asyncio.IncompleteReadError):
            process.kill()
            await process.wait()
            raise RewardWorkerError(
                f"the grading process did not start: {' '.join(self._command)}; see its error above"
            ) from None
        except asyncio.CancelledError:
            process.kill()
            raise
        if isinstance(ready, str):
            await process.wait()
            raise UserError(ready)
        return process
