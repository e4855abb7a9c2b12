"""Grading of mathematical answers: grades per second through the reward pool, compared with calling Math-Verify.

    python -m benchmarks.grading --data DIR [--prompts 150] [--rounds 3]
    python -m benchmarks.grading --data DIR --truths

The first form takes prompts from all benchmark files, each with eight responses of which half are correct, and grades
them in turn: with Math-Verify's parse and verify and their own time limits, in one process and in two; with this
project's function in one process; through its pool with one worker and with two. It prints a Markdown table: rates, and
how often the verdicts are correct. The second form grades every answer of the files in all spellings of
benchmarks/ground_truths.py and prints how many are judged equal to themselves and different from wrong ones, and every
failure.
"""

import argparse
import asyncio
import itertools
import logging
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from math_verify import parse, verify

from benchmarks.ground_truths import read_truths, renderings, wrong_answers
from minpro_megatron.rewards.mathematics import grade
from minpro_megatron.rewards.pool import RewardPool

RESPONSES = 8
Prompt = tuple[str, list[str]]  # the true answer and its responses: right, wrong, right, ...
WARM_UP: list[Prompt] = [(f"x+{number}", [f"Answer: ${number}+x$"]) for number in range(8)]


def make_prompts(folder: Path, count: int) -> list[Prompt]:
    """`count` rows of the files, in proportion to their frequency, gsm8k as often as all others together."""
    rows = [truth for truth in read_truths(folder) if truth[0] != "math_dapo"]
    chosen = random.Random(0)
    words = [truth for source, truth in rows if source == "gsm8k"]
    others = [truth for source, truth in rows if source != "gsm8k"]
    truths = chosen.sample(words, count // 2) + chosen.sample(others, count - count // 2)
    chosen.shuffle(truths)
    prompts = []
    for truth in truths:
        pairs = zip(itertools.cycle(renderings(truth)), itertools.cycle(wrong_answers(truth)), strict=False)
        prompts.append((truth, [text for pair in itertools.islice(pairs, RESPONSES // 2) for text in pair]))
    return prompts


def by_math_verify(prompt: Prompt) -> list[bool]:
    """With its defaults; the correct answer is parsed as a formula, once per prompt."""
    truth, responses = prompt
    expected = parse(truth if "$" in truth else f"${truth}$")
    return [verify(expected, parse(response)) for response in responses]


def by_grade(prompt: Prompt) -> list[bool]:
    truth, responses = prompt
    return [grade(response, truth).reward == 1.0 for response in responses]


async def by_pool(pool: RewardPool, prompts: list[Prompt]) -> list[list[bool]]:
    judged = await asyncio.gather(*(pool.judge_all("math", responses, truth) for truth, responses in prompts))
    return [[one.reward == 1.0 for one in some] for some in judged]


@dataclass
class Record:
    """The times of one way of grading, round by round, and its verdicts."""

    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    verdicts: list[list[bool]] = field(default_factory=list)


def processor_seconds() -> float:
    """Processor time of this process and its children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


@contextmanager
def timed(record: Record) -> Iterator[None]:
    wall, processor = time.perf_counter(), processor_seconds()
    yield
    record.wall_s.append(time.perf_counter() - wall)
    record.processor_s.append(processor_seconds() - processor)


async def measure(all_prompts: list[Prompt], rounds: int) -> None:
    ways: dict[str, Record] = defaultdict(Record)
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        async with RewardPool(["math"], 1, 60.0) as one, RewardPool(["math"], 2, 60.0) as two:
            processes.map(by_math_verify, WARM_UP, chunksize=1)
            await by_pool(one, WARM_UP)
            await by_pool(two, WARM_UP)
            # different prompts in each round, because all implementations cache what they have parsed
            for number in range(rounds):
                prompts = all_prompts[number::rounds]
                with timed(record := ways["Math-Verify, 1 process"]):
                    record.verdicts += [by_math_verify(prompt) for prompt in prompts]
                with timed(record := ways["Math-Verify, 2 processes"]):
                    record.verdicts += processes.map(by_math_verify, prompts, chunksize=4)
                with timed(record := ways["this project's function, 1 process"]):
                    record.verdicts += [by_grade(prompt) for prompt in prompts]
                for name, pool in (("1 worker", one), ("2 workers", two)):
                    with timed(record := ways[f"reward pool, {name}"]):
                        record.verdicts += await by_pool(pool, prompts)
            print_table(ways)
            print(f"\ntimed out {one.num_timed_out + two.num_timed_out}, failed {one.num_failed + two.num_failed}")


def print_table(ways: dict[str, Record]) -> None:
    print("| | grades/s, median (min - max) | grades per processor second | right for right | wrong for wrong |")
    print("|---|---|---|---|---|")
    for name, record in ways.items():
        count = RESPONSES * len(record.verdicts) / len(record.wall_s)
        rates = sorted(count / value for value in record.wall_s)
        right = [verdict for some in record.verdicts for verdict in some[0::2]]
        wrong = [not verdict for some in record.verdicts for verdict in some[1::2]]
        print(
            f"| {name} | {statistics.median(rates):,.0f} ({rates[0]:,.0f} - {rates[-1]:,.0f}) | "
            f"{count / statistics.median(record.processor_s):,.0f} | "
            f"{statistics.mean(right):.1%} | {statistics.mean(wrong):.1%} |"
        )


def grade_truths(folder: Path) -> None:
    total: Counter[str] = Counter()
    failures: dict[str, list[str]] = {"equal to itself": [], "different from wrong ones": []}
    num_responses = 0
    for source, truth in dict.fromkeys(read_truths(folder)):
        total[source] += 1
        for kind, responses, reward in (
            ("equal to itself", renderings(truth), 1.0),
            ("different from wrong ones", wrong_answers(truth), 0.0),
        ):
            num_responses += len(responses)
            failed = [response for response in responses if grade(response, truth).reward != reward]
            if failed:
                failures[kind].append(f"{source}: {truth!r} as {failed!r}")
    answers = total.total()
    print(f"{answers} answers ({', '.join(f'{source} {count}' for source, count in total.items())})")
    for kind, failed in failures.items():
        print(f"{kind}: {answers - len(failed)} of {answers} ({1 - len(failed) / answers:.2%})")
        print("\n".join(f"  {line}" for line in failed))
    print(f"{num_responses} responses graded")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the benchmark files")
    parser.add_argument("--prompts", type=int, default=150, help="in all rounds together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--truths", action="store_true", help="grade all true answers instead of timing")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    start = os.getloadavg()[0]
    if options.truths:
        grade_truths(options.data)
    else:
        asyncio.run(measure(make_prompts(options.data, options.prompts), options.rounds))
    print(f"\n{os.cpu_count()} cores, load {start:.1f} before and {os.getloadavg()[0]:.1f} after, {platform.machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
