"""Rewards as numbers: a function's result, or the answer of a service, is checked before it counts."""

import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsFloat, cast

import msgspec

from minpro_megatron.errors import ProjectError
from minpro_megatron.hooks.hook import is_import_path
from minpro_megatron.rewards.forms import Grade, GroupReward, GroupToGrade, ResponseReward

MAX_EXTRACTED_CHARS = 500
MAX_PROBLEM_CHARS = 500
# The number of errors in user's functions that a grading process writes with their traceback.
MAX_TRACEBACKS = 3


class Judgement(msgspec.Struct, frozen=True, array_like=True):
    """A response's reward, the part of the response that was compared, and the grading time."""

    reward: float
    extracted: str | None
    seconds: float


@dataclass(frozen=True)
class Judged:
    """A response's reward, the part that was compared and the grader's time; or, without a reward, the problem."""

    reward: float | None
    extracted: str | None = None
    seconds: float | None = None
    problem: str | None = None


class GradingFailed(ProjectError):
    """An attempt to grade a group has failed; the message says how. It may succeed when it is repeated."""

    def __init__(self, problem: str, timed_out: bool = False) -> None:
        super().__init__(problem)
        self.timed_out = timed_out


def judge(reward: ResponseReward, text: str, answer: str) -> Judgement:
    """The judgement of one response. Raises TypeError or ValueError if the grader did not return a finite number, and
    whatever it raises."""
    start = time.perf_counter()
    result = reward(text, answer)
    return judgement(result, time.perf_counter() - start)


def judge_group(reward: GroupReward, group: GroupToGrade) -> list[Judgement]:
    """The judgements of a group's responses; errors as of `judge`."""
    start = time.perf_counter()
    results = reward(group)
    return judgements(results, len(group.responses), time.perf_counter() - start)


def judgements(results: object, num_responses: int, seconds: float) -> list[Judgement]:
    """The results of a group, each of which took a share of the time. Raises TypeError or ValueError if they are not
    one finite number per response."""
    if isinstance(results, str | bytes | dict) or not hasattr(results, "__len__"):
        raise TypeError(
            f"the grader returned {str(results)[:80]!r} of type {type(results).__name__} instead of a list of numbers"
        )
    found = list(cast(Sequence[object], results))
    if len(found) != num_responses:
        raise ValueError(f"the grader returned {len(found)} rewards for {num_responses} responses")
    return [judgement(result, seconds / max(num_responses, 1)) for result in found]


def judgement(result: object, seconds: float) -> Judgement:
    """The judgement of a grader's result. Raises TypeError for anything that is not a number (including a text) and
    ValueError for inf and nan."""
    grade = result if isinstance(result, Grade) else Grade(cast(float, result))
    if not isinstance(grade.reward, SupportsFloat):
        kind = type(grade.reward).__name__
        raise TypeError(f"the grader returned {str(grade.reward)[:80]!r} of type {kind} instead of a number")
    if not math.isfinite(number := float(grade.reward)):
        raise ValueError(f"the grader returned {number}, which is not a finite number")
    extracted = None if grade.extracted is None else str(grade.extracted)[:MAX_EXTRACTED_CHARS]
    return Judgement(number, extracted, seconds)


class ErrorReports:
    """Turns the errors of graders into texts. The first errors in user's functions are also written to standard error
    with their traceback, which the log of the run then contains."""

    def __init__(self) -> None:
        self._num_written = 0

    def text(self, name: str, error: Exception) -> str:
        """The error of the grader `name`, in one line."""
        if is_import_path(name) and self._num_written < MAX_TRACEBACKS:
            self._num_written += 1
            print(f"error in the reward {name}:", file=sys.stderr)
            traceback.print_exception(error, file=sys.stderr)
            sys.stderr.flush()
        return f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARS]
