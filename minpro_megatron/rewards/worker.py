"""The process that grades: `python -m minpro_megatron.rewards.worker MEMORY_BYTES SECONDS REWARD...`.

Reads one MessagePack triple (reward's name, response text, answer) at a time from standard input, each after its
length in four bytes, and writes a Judgement the same way, or a text saying what went wrong. The first thing it
writes is empty, or a text saying why it cannot grade. Ends when its input ends.
"""

import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Mapping
from typing import BinaryIO

import msgspec

from minpro_megatron.rewards.registry import Grade, RewardFunction, load_reward

LENGTH = struct.Struct("<I")
MAX_EXTRACTED_CHARS = 500
_DECODER = msgspec.msgpack.Decoder(tuple[str, str, str])


class Judgement(msgspec.Struct, frozen=True, array_like=True):
    """A response's reward, the part of the response that was compared, and the time that took."""

    reward: float
    extracted: str | None
    seconds: float


def judge(reward: RewardFunction, text: str, answer: str) -> Judgement | str:
    start = time.perf_counter()
    try:
        result = reward(text, answer)
        grade = result if isinstance(result, Grade) else Grade(float(result))
    except MemoryError:
        # What was allocated may stay in some cache, and the next responses would fail for it: a new process.
        os._exit(1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    extracted = grade.extracted if grade.extracted is None else grade.extracted[:MAX_EXTRACTED_CHARS]
    return Judgement(grade.reward, extracted, time.perf_counter() - start)


def serve(rewards: Mapping[str, RewardFunction], seconds: float, source: BinaryIO, sink: BinaryIO) -> None:
    """Grades what comes from `source` until it ends; a response that takes longer than `seconds` ends the process."""
    while len(header := source.read(LENGTH.size)) == LENGTH.size:
        name, text, answer = _DECODER.decode(source.read(LENGTH.unpack(header)[0]))
        # The collector kills this process well before; the alarm is for one whose collector has been killed.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        result = msgspec.msgpack.encode(judge(rewards[name], text, answer))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(sink, result)


def _send(sink: BinaryIO, body: bytes) -> None:
    sink.write(LENGTH.pack(len(body)) + body)
    sink.flush()


def main() -> None:
    memory_limit, seconds, *names = sys.argv[1:]
    # A reward function that prints must not write into the answers: keep the pipe, point standard output at
    # stderr.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        rewards = {name: load_reward(name) for name in names}
    except ValueError as error:
        _send(sink, str(error).encode())
        return
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_limit), int(memory_limit)))
    _send(sink, b"")  # ready: what was imported does not count against the first time limit
    serve(rewards, float(seconds), sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
