"""Grades responses from a file in the same way as a run: in worker processes with limits of time and memory.

    minpro grade --input rows.jsonl > graded.jsonl
    minpro grade --input rows.jsonl --reward my_package.rewards:grade

Each row is `{"data_source": ..., "ground_truth": ..., "response": ...}`; with --reward it needs no data_source. It is
printed unchanged, with the new fields `reward`, `extracted` (the part of the response that was compared; null: none
was found) and `seconds`. If the grader twice hung, died, raised or returned no finite number, `reward` is null and
`problem` gives the reason. Without --reward the data source selects the reward: `calculator` calculator, `math_dapo`
dapo, all others math. A reward that grades whole groups, and a service (`--reward http --url URL`), get each row as a
group of one response, with the row's fields `prompt` and `metadata`, if it has them, and without token ids. Responses
are untrusted text: anything but printable ASCII is escaped.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from minpro_megatron.command_line import Parser, command_parser
from minpro_megatron.config.options import SettingOption
from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.errors import UserError, run_reporting
from minpro_megatron.records import Prompt
from minpro_megatron.rewards.graders import Graders, SampledText
from minpro_megatron.rewards.judging import Judged
from minpro_megatron.rewards.registry import HTTP

DEFAULT_REWARD = "math"
_PROCESSORS = os.cpu_count() or 1
OPTIONS = (
    SettingOption("--reward", "reward.function", "NAME", default_text="by the data source, as above"),
    SettingOption("--url", "reward.urls", "URL"),
    SettingOption("--workers", "reward.workers", "N", default=_PROCESSORS, default_text="the number of processors"),
    SettingOption("--timeout", "reward.timeout_s", "SECONDS"),
)
REWARD_BY_SOURCE = {"calculator": "calculator", "math_dapo": "dapo"}
FIELDS = ("data_source", "ground_truth", "response")
OPTIONAL_FIELDS = ("data_source",)  # with --reward
MAX_PROBLEMS = 20
BLOCK_ROWS = 256
PROGRESS_INTERVAL_S = 5.0

Row = dict[str, Any]


def _parser(prog: str) -> Parser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE.jsonl", help="the rows to grade")
    for option in OPTIONS:
        option.add_to(parser)
    parser.add_argument("--json", action="store_true", help="the summary on standard error as one JSON object")
    return parser


def read_rows(path: Path, needs_source: bool = True) -> list[Row]:
    """The rows of the file; those without a data source are accepted unless `needs_source`. Raises UserError, with one
    line per bad row: file, line, field and rule."""
    rows: list[Row] = []
    problems: list[str] = []
    with path.open("rb") as file:  # a line that is not UTF-8 is one bad row
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(_checked(json.loads(line), needs_source))
            except (ValueError, RecursionError) as error:
                problems.append(f"{path}, line {number}: {error}")
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError(problems[:MAX_PROBLEMS] + more)
    if not rows:
        raise UserError(f"{path}: it has no rows; give one JSON object per line with {', '.join(FIELDS)}")
    return rows


def _checked(row: Any, needs_source: bool) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object with {', '.join(FIELDS)}")
    for field in FIELDS:
        if field not in row and field in OPTIONAL_FIELDS:
            if needs_source:
                raise ValueError(f"{field} is missing; add it, or name the reward of all rows with --reward")
            continue
        if field not in row:
            raise ValueError(f"{field} is missing")
        if not isinstance(row[field], str):
            raise ValueError(f"{field} must be a text, not {json.dumps(row[field])[:60]}")
        if any("\ud800" <= character <= "\udfff" for character in row[field]):
            raise ValueError(f"{field} has half of a surrogate pair, which is not a character")
    return row


def _settings(options: argparse.Namespace) -> RewardConfig:
    if options.reward == HTTP and not options.url:
        raise UserError("--reward http: give the address of a service with --url")
    values: dict[str, Any] = {"function": DEFAULT_REWARD, "by_source": {} if options.reward else REWARD_BY_SOURCE}
    for option in OPTIONS:
        given = getattr(options, option.destination)
        if (value := option.value if given is None else given) is not None:
            values[option.setting.removeprefix("reward.")] = value
    try:
        return RewardConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_problem(entry) for entry in error.errors()) from None


def _problem(entry: Any) -> str:
    flags = {option.setting: option.flag for option in OPTIONS}
    flag = flags.get(".".join(("reward", *map(str, entry["loc"]))), "--url")  # whose rule is one of the whole section
    return f"{flag}: {entry['msg'].removeprefix('Value error, ').removeprefix('urls: ')}"


async def graded(graders: Graders, rows: Sequence[Row], at_once: int) -> AsyncIterator[tuple[Row, Judged]]:
    """The rows in their order with their judgements; `at_once` of them are graded at a time."""
    limit = asyncio.Semaphore(at_once)

    async def judge(row: Row) -> Judged:
        async with limit:
            response = SampledText(row["response"], np.zeros(0, np.int32), "stop")
            return (await graders.judge(_prompt(row), [response]))[0]

    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        for row, judged in zip(block, await asyncio.gather(*map(judge, block)), strict=True):
            yield row, judged


def _prompt(row: Row) -> Prompt:
    question, source = str(row.get("prompt", "")), row.get("data_source", "")
    return Prompt(
        id=str(row.get("id", "")),
        source=source,
        text=question,
        answer=row["ground_truth"],
        metadata=row.get("metadata"),
    )


def printed(row: Row, judged: Judged) -> str:
    """One line of printable ASCII."""
    result = row | {"reward": judged.reward, "extracted": judged.extracted, "seconds": judged.seconds}
    if judged.problem is not None:
        result["problem"] = judged.problem
    return json.dumps(result).replace("\x7f", "\\u007f")


async def grade_file(options: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """Prints the graded rows and returns the summary."""
    rewards: Counter[float] = Counter()
    start = shown = time.monotonic()
    done = 0
    settings = _settings(options)
    async with Graders(settings) as graders:
        at_once = max(settings.workers, settings.concurrency)
        async for row, judged in graded(graders, rows, at_once):
            print(printed(row, judged))
            rewards.update([] if judged.reward is None else [judged.reward])
            done += 1
            now = time.monotonic()
            if now - shown > PROGRESS_INTERVAL_S:
                shown = now
                print(f"{done} of {len(rows)} rows, {done / (now - start):.0f} rows/s", file=sys.stderr)
    seconds = time.monotonic() - start
    return {
        "rows": len(rows),
        "mean_reward": rewards.total() and sum(reward * count for reward, count in rewards.items()) / rewards.total(),
        "rewards": {str(reward): count for reward, count in sorted(rewards.items())},
        "timed_out": graders.num_timed_out,
        "failed": graders.num_failed,
        "seconds": seconds,
        "rows_per_s": len(rows) / seconds,
    }


def show_summary(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary), file=sys.stderr)
        return
    counts = ", ".join(f"{count} with reward {reward}" for reward, count in summary["rewards"].items())
    print(
        f"{summary['rows']} rows: {counts}; mean {summary['mean_reward']:.4f}; not graded: grader failed for "
        f"{summary['failed']}, exceeded its time for {summary['timed_out']}; {summary['seconds']:.1f} s, "
        f"{summary['rows_per_s']:.0f} rows/s",
        file=sys.stderr,
    )


@contextmanager
def without_failure_warnings() -> Iterator[None]:
    """Each row of the output reports its own error."""
    failures = logging.getLogger("minpro_megatron.rewards.failures")
    before = failures.level
    failures.setLevel(logging.ERROR)
    try:
        yield
    finally:
        failures.setLevel(before)


def main(arguments: list[str] | None = None, prog: str = "minpro grade") -> int:
    """0 on success, 2 after a message about the input or the reward."""
    options = _parser(prog).parse_args(arguments)

    def grade() -> int:
        rows = read_rows(options.input, needs_source=options.reward is None)
        with without_failure_warnings():
            summary = asyncio.run(grade_file(options, rows))
        show_summary(summary, options.json)
        return 0

    return run_reporting(grade, reads_given_files=True)
