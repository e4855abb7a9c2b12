"""The process of async rewards: `python -m minpro_megatron.rewards.async_worker MEMORY_BYTES ATTEMPT_SECONDS
BLOCKED_SECONDS REWARD...`.

Reads one AsyncRequest at a time, as a message of MessagePack (pipe_messages.py), and writes an AsyncResult for each,
in the order in which they end. A group that takes more than ATTEMPT_SECONDS is cancelled. Its first output is that of
the other worker. Ends when its input has ended and the last group is graded.

A function that computes without awaiting anything stops all groups, so the process ends with SIGALRM once its event
loop has not run for BLOCKED_SECONDS.
"""

import asyncio
import inspect
import signal
import sys
import time
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, cast

import msgspec

from minpro_megatron.pipe_messages import next_message, output_for_messages, write_message
from minpro_megatron.rewards.forms import GroupToGrade, RewardFunction
from minpro_megatron.rewards.judging import ErrorReports, Judgement, judgements
from minpro_megatron.rewards.worker import limit_memory, loaded

ALIVE_EVERY_S = 0.25


class AsyncRequest(msgspec.Struct, frozen=True, array_like=True):
    """Grade a group with the reward `name`."""

    number: int
    name: str
    group: GroupToGrade


class AsyncResult(msgspec.Struct, frozen=True, array_like=True):
    """The judgements of the request of this number, or a text with the error."""

    number: int
    result: list[Judgement] | str
    timed_out: bool = False


_DECODER = msgspec.msgpack.Decoder(AsyncRequest)


async def graded(reward: RewardFunction, request: AsyncRequest, attempt_s: float, reports: ErrorReports) -> AsyncResult:
    """The result of one request."""
    start = time.perf_counter()
    limit = asyncio.timeout(attempt_s)
    try:
        async with limit:
            called = cast(Any, reward)(request.group)
            results = await cast(Awaitable[Any], called) if inspect.isawaitable(called) else called
        found = judgements(results, len(request.group.responses), time.perf_counter() - start)
    except Exception as error:
        if limit.expired():
            return AsyncResult(request.number, f"no result within reward.attempt_timeout_s = {attempt_s:g} s", True)
        return AsyncResult(request.number, reports.text(request.name, error))
    return AsyncResult(request.number, found)


async def serve(
    rewards: Mapping[str, RewardFunction], attempt_s: float, blocked_s: float, source: BinaryIO, sink: BinaryIO
) -> None:
    """Grades the requests from `source` concurrently until it ends."""
    reports, reader = ErrorReports(), asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)

    async def answer(request: AsyncRequest) -> None:
        write_message(sink, msgspec.msgpack.encode(await graded(rewards[request.name], request, attempt_s, reports)))

    alive = asyncio.create_task(_show_life(blocked_s))
    try:
        async with asyncio.TaskGroup() as tasks:
            with suppress(asyncio.IncompleteReadError):
                while True:
                    tasks.create_task(answer(_DECODER.decode(await next_message(reader))))
    finally:
        alive.cancel()


async def _show_life(blocked_s: float) -> None:
    while True:
        signal.setitimer(signal.ITIMER_REAL, blocked_s)
        await asyncio.sleep(ALIVE_EVERY_S)


def main() -> None:
    memory_limit, attempt_s, blocked_s, *names = sys.argv[1:]
    sink = output_for_messages()
    rewards = loaded(names, sink)
    if rewards is not None:
        limit_memory(int(memory_limit))
        asyncio.run(serve(rewards, float(attempt_s), float(blocked_s), sys.stdin.buffer, sink))


if __name__ == "__main__":
    main()
