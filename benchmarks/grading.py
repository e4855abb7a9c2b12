"""Grading mathematical answers: grades a second through the reward pool, against Math-Verify called directly.

    python -m benchmarks.grading --data ../shared/data [--prompts 150] [--rounds 3]
    python -m benchmarks.grading --data ../shared/data --truths

The first form takes prompts from all benchmark files, each with eight responses of which half are right, and grades
them in turns: by Math-Verify's parse and verify with their own time limits, in one process and in two; by this project's
function in one process; through its pool with one worker and with two. It prints Markdown tables: rates, and how often
the verdicts are right. The second form grades every answer of the files in all spellings of benchmarks/ground_truths.py
and prints how many are judged equal to themselves and different from wrong ones, and every failure.
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
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from math_verify import parse, verify

from benchmarks.ground_truths import read_truths, renderings, wrong_answers
from minpro_megatron.rewards.mathematics import grade
from minpro_megatron.rewards.pool import RewardPool

RESPONSES = 8
Prompt = tuple[str, list[str]]  # the true answer and its responses: right, wrong, right, ...


def make_prompts(folder: Path, count: int) -> list[Prompt]:
    """`count` rows of the files, as often as they occur there, gsm8k as often as all others together."""
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
    """Its defaults, the true answer as a formula, once for each prompt."""
    truth, responses = prompt
    expected = parse(truth if "$" in truth else f"${truth}$")
    return [verify(expected, parse(response)) for response in responses]


def by_grade(prompt: Prompt) -> list[bool]:
    truth, responses = prompt
    return [grade(response, truth).reward == 1.0 for response in responses]


async def by_pool(pool: RewardPool, prompts: list[Prompt]) -> list[list[bool]]:
    rewards = await asyncio.gather(*(pool.grade_all(responses, truth, "math") for truth, responses in prompts))
    return [[reward == 1.0 for reward in some] for some in rewards]


def timed(run: Callable[[], list[list[bool]]], seconds: list[float]) -> list[list[bool]]:
    start = time.perf_counter()
    verdicts = run()
    seconds.append(time.perf_counter() - start)
    return verdicts


async def measure(prompts: list[Prompt], rounds: int) -> None:
    seconds: dict[str, list[float]] = {}
    verdicts: dict[str, list[list[bool]]] = {}

    def take(name: str, run: Callable[[], list[list[bool]]]) -> None:
        verdicts[name] = timed(run, seconds.setdefault(name, []))

    context = multiprocessing.get_context("fork")
    with context.Pool(2) as processes:
        async with RewardPool("math", 1, 5.0) as one, RewardPool("math", 2, 5.0) as two:
            warm = prompts[:2]
            processes.map(by_math_verify, warm * 4, chunksize=1)
            await by_pool(one, warm)
            await by_pool(two, warm * 4)
            for _ in range(rounds):
                take("Math-Verify, 1 process", lambda: [by_math_verify(prompt) for prompt in prompts])
                take("Math-Verify, 2 processes", lambda: processes.map(by_math_verify, prompts, chunksize=4))
                take("this project's function, 1 process", lambda: [by_grade(prompt) for prompt in prompts])
                for name, pool in (("1 worker", one), ("2 workers", two)):
                    start = time.perf_counter()
                    verdicts[f"reward pool, {name}"] = await by_pool(pool, prompts)
                    seconds.setdefault(f"reward pool, {name}", []).append(time.perf_counter() - start)
            print_table(prompts, seconds, verdicts)
            print(f"\nkilled {one.num_killed + two.num_killed}, failed {one.num_errors + two.num_errors}")


def print_table(prompts: list[Prompt], seconds: dict[str, list[float]], verdicts: dict[str, list[list[bool]]]) -> None:
    count = RESPONSES * len(prompts)
    print("| | grades/s, median (min - max) | right taken for right | wrong taken for wrong |\n|---|---|---|---|")
    for name, times in seconds.items():
        rates = sorted(count / value for value in times)
        right = [verdict for some in verdicts[name] for verdict in some[0::2]]
        wrong = [not verdict for some in verdicts[name] for verdict in some[1::2]]
        print(
            f"| {name} | {statistics.median(rates):,.0f} ({rates[0]:,.0f} - {rates[-1]:,.0f}) | "
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
    parser.add_argument("--prompts", type=int, default=150)
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
