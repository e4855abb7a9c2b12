"""The grading process: `python -m minpro_megatron.rewards.worker MEMORY_BYTES CPU_SECONDS WALL_SECONDS REWARD...`.

Reads one MessagePack triple (reward's name, response text, answer) at a time from standard input, each after its
length in four bytes, and writes a Judgement the same way, or a text with the error. Its first output is empty, or a
text with the reason why it cannot grade. Ends when its input ends.

A response that needs more than CPU_SECONDS of processor time ends the process with SIGPROF. The limit is on processor
time because the wall time of a normal grade depends on the load of the machine.
"""

import math
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Mapping
from typing import BinaryIO, SupportsFloat

import msgspec

from minpro_megatron.rewards.registry import Grade, RewardFunction, load_reward

LENGTH = struct.Struct("<I")
MAX_EXTRACTED_CHARS = 500
MAX_PROBLEM_CHARS = 500
OUT_OF_MEMORY = 3  # exit status
_DECODER = msgspec.msgpack.Decoder(tuple[str, str, str])


class Judgement(msgspec.Struct, frozen=True, array_like=True):
    """A response's reward, the part of the response that was compared, and the grading time."""

    reward: float
    extracted: str | None
    seconds: float


def judge(reward: RewardFunction, text: str, answer: str) -> Judgement | str:
    """The judgement, or a text saying what the grader raised or returned in place of a finite number."""
    start = time.perf_counter()
    try:
        result = reward(text, answer)
        grade = result if isinstance(result, Grade) else Grade(result)
        number = _finite(grade.reward)
        extracted = None if grade.extracted is None else str(grade.extracted)[:MAX_EXTRACTED_CHARS]
    except MemoryError:
        # Allocated memory may stay in a cache, and the next responses would fail because of it: use a new process.
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARS]
    return Judgement(number, extracted, time.perf_counter() - start)


def _finite(value: object) -> float:
    """Raises TypeError for anything that is not a number (including a text) and ValueError for inf and nan."""
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"the grader returned {str(value)[:80]!r} of type {type(value).__name__} instead of a number")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"the grader returned {number}, which is not a finite number")
    return number


def serve(rewards: Mapping[str, RewardFunction], cpu_s: float, wall_s: float, source: BinaryIO, sink: BinaryIO) -> None:
    """Grades the requests from `source` until it ends. A response that takes more than `cpu_s` of processor time, or
    `wall_s` of wall time, ends the process."""
    while len(header := source.read(LENGTH.size)) == LENGTH.size:
        name, text, answer = _DECODER.decode(source.read(LENGTH.unpack(header)[0]))
        # The default action of both signals ends the process even during a call into C.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        result = msgspec.msgpack.encode(judge(rewards[name], text, answer))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(sink, result)


def _send(sink: BinaryIO, body: bytes) -> None:
    sink.write(LENGTH.pack(len(body)) + body)
    sink.flush()


def main() -> None:
    memory_limit, cpu_s, wall_s, *names = sys.argv[1:]
    # A reward function that prints must not write into the answers: keep the pipe for them, and redirect standard
    # output to stderr.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        rewards = {name: load_reward(name) for name in names}
    except ValueError as error:
        _send(sink, str(error).encode())
        return
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_limit), int(memory_limit)))
    _send(sink, b"")  # ready: imports do not count towards the first time limit
    serve(rewards, float(cpu_s), float(wall_s), sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
