"""The process that grades: `python -m minpro_megatron.rewards.worker <reward name> <memory limit in bytes>`.

Reads one MessagePack pair (response text, answer) at a time from standard input, each after its length in
four bytes, and writes the reward the same way: a float, or a text saying what went wrong. Ends when its
input ends.
"""

import os
import resource
import struct
import sys
from typing import BinaryIO

import msgspec

from minpro_megatron.rewards.registry import RewardFunction, load_reward

LENGTH = struct.Struct("<I")


def _grade(reward: RewardFunction, text: str, answer: str) -> float | str:
    try:
        return float(reward(text, answer))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


def serve(reward: RewardFunction, source: BinaryIO, sink: BinaryIO) -> None:
    """Grades what comes from `source` until it ends."""
    while len(header := source.read(LENGTH.size)) == LENGTH.size:
        text, answer = msgspec.msgpack.decode(source.read(LENGTH.unpack(header)[0]), type=tuple[str, str])
        result = msgspec.msgpack.encode(_grade(reward, text, answer))
        sink.write(LENGTH.pack(len(result)) + result)
        sink.flush()


def main() -> None:
    name, memory_limit = sys.argv[1], int(sys.argv[2])
    reward = load_reward(name)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    # A reward function that prints must not write into the answers: keep the pipe, point standard output at
    # stderr.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sink.write(LENGTH.pack(0))  # ready: what was imported does not count against the first time limit
    sink.flush()
    serve(reward, sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
