"""The grading process: `python -m minpro_megatron.rewards.worker MEMORY_BYTES CPU_SECONDS WALL_SECONDS REWARD...`.

Reads one Request at a time from standard input, as a message of MessagePack (pipe_messages.py), and writes the same way
a Judgement, for a group a list of them, or a text with the error. Its first output are the forms of the rewards by
name, or a text with the reason why it cannot grade. Ends when its input ends.

A response that needs more than CPU_SECONDS of processor time ends the process with SIGPROF, and so does a group that
needs as much for each of its responses. The limit is on processor time because the wall time of a normal grade depends
on the load of the machine.
"""

import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import BinaryIO, cast

import msgspec

from minpro_megatron.pipe_messages import output_for_messages, read_message, write_message
from minpro_megatron.rewards.forms import Form, GroupReward, GroupToGrade, ResponseReward, RewardFunction, form_of
from minpro_megatron.rewards.judging import ErrorReports, Judgement, judge, judge_group
from minpro_megatron.rewards.registry import load_reward

OUT_OF_MEMORY = 3  # exit status


class Request(msgspec.Struct, frozen=True, array_like=True):
    """Grade one response with the reward `name`, or a whole group."""

    name: str
    text: str = ""
    answer: str = ""
    group: GroupToGrade | None = None


_DECODER = msgspec.msgpack.Decoder(Request)


def serve(rewards: Mapping[str, RewardFunction], cpu_s: float, wall_s: float, source: BinaryIO, sink: BinaryIO) -> None:
    """Grades the requests from `source` until it ends. A response that takes more than `cpu_s` of processor time, or
    `wall_s` of wall time, ends the process."""
    reports = ErrorReports()
    while (body := read_message(source)) is not None:
        request = _DECODER.decode(body)
        share = 1 if request.group is None else max(1, len(request.group.responses))
        # The default action of both signals ends the process even during a call into C.
        signal.setitimer(signal.ITIMER_PROF, share * cpu_s)
        signal.setitimer(signal.ITIMER_REAL, share * wall_s)
        result = msgspec.msgpack.encode(_graded(rewards[request.name], request, reports))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_message(sink, result)


def _graded(reward: RewardFunction, request: Request, reports: ErrorReports) -> Judgement | list[Judgement] | str:
    try:
        if request.group is not None:
            return judge_group(cast(GroupReward, reward), request.group)
        return judge(cast(ResponseReward, reward), request.text, request.answer)
    except MemoryError:
        # Allocated memory may stay in a cache, and the next responses would fail because of it: use a new process.
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        return reports.text(request.name, error)


def loaded(names: Sequence[str], sink: BinaryIO) -> dict[str, RewardFunction] | None:
    """The rewards by name, after their forms were sent; None after a refusal was sent."""
    try:
        rewards = {name: load_reward(name) for name in names}
    except ValueError as error:
        write_message(sink, msgspec.msgpack.encode(str(error)))
        return None
    forms: dict[str, Form] = {name: form_of(reward) for name, reward in rewards.items()}
    write_message(sink, msgspec.msgpack.encode(forms))  # ready: imports do not count towards the first time limit
    return rewards


def limit_memory(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def main() -> None:
    memory_limit, cpu_s, wall_s, *names = sys.argv[1:]
    sink = output_for_messages()
    rewards = loaded(names, sink)
    if rewards is not None:
        limit_memory(int(memory_limit))
        serve(rewards, float(cpu_s), float(wall_s), sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
