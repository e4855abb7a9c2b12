"""Checks that the graders of the settings work on rows of the run's files: a function in the same kind of process that
will grade, a service with a request."""

import asyncio
import io
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
from minpro_megatron.pipe_messages import framed, read_message
from minpro_megatron.prompts.prompts import load_prompts, select_prompts
from minpro_megatron.records import Prompt
from minpro_megatron.rewards.async_pool import async_worker_command
from minpro_megatron.rewards.async_worker import AsyncRequest, AsyncResult
from minpro_megatron.rewards.forms import Form, GroupToGrade, ResponseToGrade
from minpro_megatron.rewards.judging import GradingFailed, Judgement
from minpro_megatron.rewards.pool import START_TIMEOUT_S, WALL_FACTOR, worker_command
from minpro_megatron.rewards.registry import HTTP, REWARDS, check_reward_name
from minpro_megatron.rewards.services import RewardServices
from minpro_megatron.rewards.worker import Request

ROWS_PER_FILE = 6  # number of rows for the trial of a grader, spread over the rows that it grades


class Trial(NamedTuple):
    """A response to grade, its prompt, and the name of the row for messages."""

    text: str
    prompt: Prompt
    row: str

    @property
    def answer(self) -> str:
        return self.prompt.answer

    def as_group(self) -> GroupToGrade:
        """A group of this response and an empty one, without token ids."""
        prompt = self.prompt
        return GroupToGrade(
            id=prompt.id, source=prompt.source, prompt=prompt.text, answer=prompt.answer, prefix=prompt.prefix,
            metadata=prompt.metadata, responses=[ResponseToGrade(text=self.text), ResponseToGrade(text=prompt.prefix)],
        )  # fmt: skip


def reward_problems(config: RunConfig) -> Iterator[str]:
    """A line for each setting whose reward is unknown, cannot be imported or reached, or does not give a finite number
    for a response to a row of the run's files."""
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
    if HTTP in names.values():
        yield from _service_problems(settings, list(_trials(settings, HTTP, files)))
    refusals: dict[str, str] = {}  # by name: each grader is tried once
    for setting, name in names.items():
        try:
            check_reward_name(name, setting)
        except UserError as error:
            yield str(error)
            continue
        if name == HTTP:
            continue
        if name not in refusals:
            refusals[name] = _refusal(name, list(_trials(settings, name, files)), settings)
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
                yield Trial(prompt.prefix + text, prompt, row)


def _service_problems(settings: RewardConfig, trials: Sequence[Trial]) -> list[str]:
    """A line for each service that does not grade the first trial."""

    async def ask(url: str) -> str:
        services = RewardServices(settings.urls, settings.attempt_timeout_s)
        try:
            async with services:
                await services.judge_at(url, trials[0].as_group())
        except GradingFailed as error:
            return (
                f"reward.urls: {error} (for {trials[0].row}); start the service, or correct the address or its answer"
            )
        return ""

    async def ask_all() -> list[str]:
        return await asyncio.gather(*map(ask, settings.urls))

    return list(filter(None, asyncio.run(ask_all()))) if trials else []


def _refusal(name: str, trials: Sequence[Trial], settings: RewardConfig) -> str:
    """The reason why a grading process cannot load the reward or grade with it; empty if it can. No code of the user
    runs in this process."""
    form: Form = "response"
    if name not in REWARDS:
        found = _form(name, settings.timeout_s)
        if isinstance(found, _Refusal):
            return found.reason
        form = found
    return _async_refusal(name, trials, settings) if form == "async" else _sync_refusal(name, trials, settings, form)


class _Refusal(NamedTuple):
    reason: str


def _form(name: str, timeout_s: float) -> Form | _Refusal:
    """The form of the user's function, as a grading process reports it."""
    ended = _ended(tuple(worker_command([name], timeout_s, WALL_FACTOR * timeout_s)), b"", *_place())
    return _Refusal(_no_answer(0)) if ended is None else _ready(name, ended)


def _ready(name: str, ended: "subprocess.CompletedProcess[bytes]") -> Form | _Refusal:
    """The form that is stated in the first message of an ended process."""
    answers = list(_bodies(ended.stdout))
    if not answers:
        lines = ended.stderr.decode(errors="replace").strip().splitlines() or ["without a message"]
        return _Refusal(
            f"its import ended the grading process with exit code {ended.returncode} ({lines[-1]}); correct the module"
        )
    ready = msgspec.msgpack.decode(answers[0], type=dict[str, Form] | str)
    if isinstance(ready, str):
        return _Refusal(" ".join(ready.removeprefix(f"reward = {name}: ").split()))
    return ready[name]


def _no_answer(num_trials: int) -> str:
    return (
        f"its module was not imported, or {num_trials} responses not graded, within {START_TIMEOUT_S:g} s; what it "
        "does at import must be short"
    )


def _sync_refusal(name: str, trials: Sequence[Trial], settings: RewardConfig, form: Form) -> str:
    timeout_s = settings.timeout_s
    requests = [
        Request(name, group=trial.as_group()) if form == "group" else Request(name, trial.text, trial.answer)
        for trial in trials
    ]
    command = worker_command([name], timeout_s, wall_s=WALL_FACTOR * timeout_s)
    ended = _ended(tuple(command), _stream(requests), *_place())
    if ended is None:
        return _no_answer(len(trials))
    if isinstance(ready := _ready(name, ended), _Refusal):
        return ready.reason
    answers = list(_bodies(ended.stdout))[1:]
    kind = list[Judgement] if form == "group" else Judgement
    for trial, answer in zip(trials, answers, strict=False):
        judged = msgspec.msgpack.decode(answer, type=kind | str)
        if isinstance(judged, str):
            return _about(trial, judged)
    if len(answers) < len(trials):
        late = ended.returncode in (-signal.SIGPROF, -signal.SIGALRM)
        limit = f"it exceeded reward.timeout_s = {timeout_s:g} s of processor time, or {WALL_FACTOR:g} times as"
        how = f"{limit} much wall time" if late else f"it ended the process with exit code {ended.returncode}"
        return _about(trials[len(answers)], how)
    return ""


def _async_refusal(name: str, trials: Sequence[Trial], settings: RewardConfig) -> str:
    requests = [AsyncRequest(number, name, trial.as_group()) for number, trial in enumerate(trials)]
    command = async_worker_command([name], settings.attempt_timeout_s)
    ended = _ended(tuple(command), _stream(requests), *_place())
    if ended is None:
        return _no_answer(len(trials))
    if isinstance(ready := _ready(name, ended), _Refusal):
        return ready.reason
    results = [msgspec.msgpack.decode(answer, type=AsyncResult) for answer in list(_bodies(ended.stdout))[1:]]
    for result in sorted(results, key=lambda one: one.number):
        if isinstance(result.result, str):
            return _about(trials[result.number], result.result)
    if len(results) < len(trials):
        return f"it ended the process with exit code {ended.returncode}; correct the function"
    return ""


def _about(trial: Trial, problem: str) -> str:
    problem_line = " ".join(problem.split())
    return (
        f"{problem_line} for the response {trial.text[:80]!r} and the answer {trial.answer[:80]!r} ({trial.row}); "
        "correct the grader, or the row"
    )


def _stream(requests: Sequence[Request | AsyncRequest]) -> bytes:
    return b"".join(framed(msgspec.msgpack.encode(request)) for request in requests)


def _place() -> tuple[str, str]:
    """What decides which modules a process finds."""
    return os.getcwd(), os.environ.get("PYTHONPATH", "")


@cache  # importing the libraries of a grader takes seconds
def _ended(
    command: tuple[str, ...], requests: bytes, folder: str, path: str
) -> "subprocess.CompletedProcess[bytes] | None":
    """The finished grading process for these requests, in `folder` with PYTHONPATH `path`; None if it took too long."""
    try:
        return subprocess.run(command, input=requests, capture_output=True, timeout=START_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None


def _bodies(stream: bytes) -> Iterator[bytearray]:
    """The messages that the worker has written, without their lengths."""
    source = io.BytesIO(stream)
    while (body := read_message(source)) is not None:  # None also if the process ended while it was writing
        yield body
