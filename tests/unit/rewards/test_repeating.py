"""Attempts are repeated with growing pauses until a deadline; the test advances the clock."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from minpro_megatron.rewards import repeating
from minpro_megatron.rewards.judging import GradingFailed
from minpro_megatron.rewards.repeating import repeated


def failing(times: int) -> tuple[Callable[[float], Awaitable[str]], list[int]]:
    calls: list[int] = []

    async def attempt(left_s: float) -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise GradingFailed(f"failure {len(calls)}")
        return "graded"

    return attempt, calls


def run(
    attempt: Callable[[float], Awaitable[str]], deadline_s: float = 1e6, max_attempts: int | None = None
) -> tuple[str, list[str], float]:
    """(the result, the failures that were reported, the seconds of the clock)"""
    failures: list[GradingFailed] = []

    async def main() -> tuple[str, float]:
        loop = asyncio.get_running_loop()
        passed = 0.0
        now, sleep = loop.time, asyncio.sleep

        async def advance(seconds: float) -> None:
            nonlocal passed
            passed += seconds
            await sleep(0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repeating.asyncio, "sleep", advance)
            patch.setattr(repeating.random, "uniform", lambda low, high: high)
            patch.setattr(loop, "time", lambda: now() + passed)
            return await repeated(attempt, deadline_s, failures.append, max_attempts), passed

    result, passed = asyncio.run(main())
    return result, [str(failure) for failure in failures], passed


def test_the_first_success_is_the_result() -> None:
    attempt, calls = failing(3)
    result, failures, passed = run(attempt)
    assert (result, failures) == ("graded", ["failure 1", "failure 2", "failure 3"])
    assert len(calls) == 4
    assert passed == 0.5 + 1 + 2


def test_pauses_grow_to_a_limit() -> None:
    attempt, _ = failing(9)
    assert run(attempt)[2] == 0.5 + 1 + 2 + 4 + 8 + 16 + 30 + 30 + 30


def test_the_deadline_ends_with_the_last_failure_and_its_attempt() -> None:
    attempt, calls = failing(100)
    with pytest.raises(GradingFailed) as error:
        run(attempt, deadline_s=10)
    assert len(calls) == 5  # after 0, 0.5, 1.5, 3.5 and 7.5 s; the next pause would end after 15.5 s
    assert str(error.value) == "failure 5 (attempt 5, within reward.deadline_s = 10 s)"


def test_a_function_is_called_a_limited_number_of_times() -> None:
    attempt, calls = failing(100)
    with pytest.raises(GradingFailed, match=r"failure 2 \(attempt 2, as often as a function is called\)"):
        run(attempt, max_attempts=2)
    assert len(calls) == 2


def test_an_attempt_knows_how_much_time_is_left() -> None:
    told: list[float] = []

    async def attempt(left_s: float) -> str:
        told.append(left_s)
        raise GradingFailed("failure")

    with pytest.raises(GradingFailed):
        run(attempt, deadline_s=9)
    assert told == pytest.approx([9, 8.5, 7.5, 5.5, 1.5], abs=0.4)


def test_no_attempt_is_made_with_so_little_time_that_it_would_hide_the_failure_before() -> None:
    attempt, calls = failing(100)
    with pytest.raises(GradingFailed, match=r"failure 4 \(attempt 4, within reward\.deadline_s = 7\.8 s\)"):
        run(attempt, deadline_s=7.8)
    assert len(calls) == 4  # a fifth one after 7.5 s would have 0.3 s


def test_other_errors_are_no_failures_of_grading() -> None:
    async def wrong(left_s: float) -> str:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run(wrong)
