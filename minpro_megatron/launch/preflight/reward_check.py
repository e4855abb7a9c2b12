"""Checks that the graders of the settings work: each is called in the same kind of process that will grade, on rows of
the run's files."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import msgspec

from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.in_run import load_benchmarks
from minpro_megatron.prompts.prompts import load_prompts, select_prompts
from minpro_megatron.records import Prompt
from minpro_megatron.rewards.pool import START_TIMEOUT_S, WALL_FACTOR, worker_command
from minpro_megatron.rewards.registry import check_reward_name
from minpro_megatron.rewards.worker import LENGTH, Judgement

ROWS_PER_FILE = 6  # number of rows for the trial of a grader, spread over the rows that it grades


class Trial(NamedTuple):
    """A response to grade, and the row of its answer, for messages."""

    text: str
    answer: str
    row: str


def reward_problems(config: RunConfig) -> Iterator[str]:
    """A line for each setting whose reward is unknown, cannot be imported, or does not give a finite number for a
    response to a row of the run's files."""
    yield from grader_problems(config.reward, files_of(config))


def files_of(config: RunConfig) -> dict[str, Sequence[Prompt]]:
    """The prompts of the run's files by setting; unreadable files are skipped, because another check reports them."""
    data, wanted = config.data, config.evaluation.num_prompts
    reads: dict[str, Callable[[], Sequence[Prompt]]] = {
        "data.train_file": lambda: select_prompts(load_prompts(data.train_file, "data.train_file"), data),
        "data.heldout_file": lambda: load_prompts(data.heldout_file, "data.heldout_file")[:wanted],
        "evaluation.benchmarks": lambda: [prompt for prompts in load_benchmarks(config) for prompt in prompts],
    }
    found = {}
    for field, read in reads.items():
        try:
            found[field] = read()
        except UserError:
            continue
    return found


def grader_problems(
    settings: RewardConfig, files: Mapping[str, Sequence[Prompt]], field: str = "reward.function"
) -> Iterator[str]:
    """A line for each grader that cannot grade the responses to prompts of `files`; `field` is the setting of the
    default grader."""
    names = {field: settings.function}
    names |= {f"reward.by_source[{source!r}]": name for source, name in settings.by_source.items()}
    refusals: dict[str, str] = {}  # by name: each grader is tried once
    for setting, name in names.items():
        try:
            check_reward_name(name, setting)
        except UserError as error:
            yield str(error)
            continue
        if name not in refusals:
            refusals[name] = _refusal(name, list(_trials(settings, name, files)), settings.timeout_s)
        if refusals[name]:
            yield f"{setting} = {name!r}: {refusals[name]}"


def _trials(settings: RewardConfig, name: str, files: Mapping[str, Sequence[Prompt]]) -> Iterator[Trial]:
    """Correct responses in several forms, and a wrong one."""
    for file, prompts in files.items():
        graded = [prompt for prompt in prompts if settings.by_source.get(prompt.source, settings.function) == name]
        for place, prompt in enumerate(graded[:: -(-len(graded) // ROWS_PER_FILE) or 1]):
            row = f"prompt {prompt.id!r} of {file}"
            texts = [prompt.answer, f"Answer: {prompt.answer}", f"\\boxed{{{prompt.answer}}}", ""]
            for text in texts if place == 0 else texts[:1]:
                yield Trial(prompt.prefix + text, prompt.answer, row)


def _refusal(name: str, trials: Sequence[Trial], timeout_s: float) -> str:
    """The reason why a grading process cannot load the reward or grade with it; empty if it can. No code of the user
    runs in this process."""
    requests = [msgspec.msgpack.encode((name, trial.text, trial.answer)) for trial in trials]
    body = b"".join(LENGTH.pack(len(request)) + request for request in requests)
    ended = _ended(name, timeout_s, body, os.getcwd(), os.environ.get("PYTHONPATH", ""))
    if ended is None:
        return (
            f"its module was not imported, or {len(trials)} responses not graded, within {START_TIMEOUT_S:g} s; what "
            "it does at import must be short"
        )
    answers = list(_bodies(ended.stdout))
    if not answers:
        lines = ended.stderr.decode(errors="replace").strip().splitlines() or ["without a message"]
        return (
            f"its import ended the grading process with exit code {ended.returncode} ({lines[-1]}); correct the module"
        )
    if answers[0]:
        return " ".join(answers[0].decode(errors="replace").split())
    for trial, answer in zip(trials, answers[1:], strict=False):
        judged = msgspec.msgpack.decode(answer, type=Judgement | str)
        if not isinstance(judged, Judgement):
            return _about(trial, judged)
    if len(answers) <= len(trials):
        late = ended.returncode in (-signal.SIGPROF, -signal.SIGALRM)
        limit = f"it exceeded reward.timeout_s = {timeout_s:g} s of processor time, or {WALL_FACTOR:g} times as"
        how = f"{limit} much wall time" if late else f"it ended the process with exit code {ended.returncode}"
        return _about(trials[len(answers) - 1], how)
    return ""


def _about(trial: Trial, problem: str) -> str:
    problem_line = " ".join(problem.split())
    return (
        f"{problem_line} for the response {trial.text[:80]!r} and the answer {trial.answer[:80]!r} ({trial.row}); "
        "correct the grader, or the row"
    )


@cache  # importing the libraries of a grader takes seconds
def _ended(
    name: str, timeout_s: float, requests: bytes, folder: str, path: str
) -> "subprocess.CompletedProcess[bytes] | None":
    """The finished grading process for these requests, in `folder` with PYTHONPATH `path`; None if it took too long."""
    command = worker_command([name], timeout_s, wall_s=WALL_FACTOR * timeout_s)
    try:
        return subprocess.run(command, input=requests, capture_output=True, timeout=START_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None


def _bodies(stream: bytes) -> Iterator[bytes]:
    """The messages that the worker has written, without their lengths."""
    place = 0
    while place + LENGTH.size <= len(stream):
        (length,) = LENGTH.unpack_from(stream, place)
        start, place = place + LENGTH.size, place + LENGTH.size + length
        if place <= len(stream):  # otherwise the process ended while it was writing
            yield stream[start:place]
