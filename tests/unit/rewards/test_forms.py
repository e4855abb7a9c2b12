"""The form of a reward function, and which results count as rewards."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from minpro_megatron.errors import UserError
from minpro_megatron.rewards.forms import Form, Grade, GroupToGrade, ResponseToGrade, form_of
from minpro_megatron.rewards.judging import Judgement, judge, judge_group, judgements
from minpro_megatron.rewards.registry import REWARDS, load_response_reward, load_reward


def of_response(response: str, answer: str) -> float:
    return float(response == answer)


def of_group(group: GroupToGrade) -> list[float]:
    return [len(response.token_ids) + 0.5 for response in group.responses]


async def of_group_async(group: GroupToGrade) -> list[float]:
    return of_group(group)


class Judge:
    async def __call__(self, group: GroupToGrade) -> list[float]:
        return of_group(group)

    async def method(self, group: GroupToGrade) -> list[float]:
        return of_group(group)


def with_default(response: str, answer: str = "", *, strict: bool = False) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (of_response, "response"), (with_default, "response"), (lambda *texts: 1.0, "response"), (math_like := max,
        "response"), (of_group, "group"), (of_group_async, "async"), (Judge(), "async"), (Judge().method, "async"),
        (functools.partial(of_group_async), "async"), (functools.partial(of_response, answer="1"), "group"),
    ],
)  # fmt: skip
def test_the_form_follows_from_the_arguments(function: Callable[..., Any], form: Form) -> None:
    assert form_of(function) == form


def test_the_rewards_of_the_project_grade_one_response() -> None:
    assert {form_of(load_reward(name)) for name in REWARDS} == {"response"}


async def of_response_async(response: str, answer: str) -> float:
    return 1.0


@pytest.mark.parametrize("function", [lambda: 1.0, lambda a, b, c: 1.0, of_response_async])
def test_other_functions_are_refused_with_the_forms(function: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"its arguments are \(.*\); a reward is a function \(response, answer\), or "):
        form_of(function)


def test_where_there_is_no_group_the_other_forms_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"lengths' has the form 'group', and here a function \(response, answer\) is n"
    ):
        load_response_reward("tests.support.async_rewards:lengths")


GROUP = GroupToGrade(
    id="p1",
    source="s",
    prompt="1+1=",
    answer="2",
    metadata={"level": 3},
    responses=[ResponseToGrade(text="2", token_ids=[5, 6]), ResponseToGrade(text="3", token_ids=[7])],
)


def test_results_become_judgements_with_their_time() -> None:
    found = judge(lambda response, answer: Grade(-1, "seven" * 200), "a", "b")
    assert (found.reward, len(found.extracted or "")) == (-1.0, 500)
    assert found.seconds >= 0
    assert [one.reward for one in judge_group(of_group, GROUP)] == [2.5, 1.5]
    assert judgements((Grade(1.0, "x"), True), 2, 1.0) == [Judgement(1.0, "x", 0.5), Judgement(1.0, None, 0.5)]


@pytest.mark.parametrize(
    ("results", "problem"),
    [
        (None, "returned 'None' of type NoneType instead of a list of numbers"),
        (1.0, "returned '1.0' of type float instead of a list of numbers"),
        ("12", "returned '12' of type str instead of a list of numbers"),
        ({0: 1.0, 1: 1.0}, "of type dict instead of a list of numbers"),
        ([1.0], "returned 1 rewards for 2 responses"),
        ([1.0, "1.0"], "returned '1.0' of type str instead of a number"),
        ([1.0, None], "returned 'None' of type NoneType instead of a number"),
        ([1.0, float("nan")], "returned nan, which is not a finite number"),
        ([1.0, float("inf")], "returned inf, which is not a finite number"),
    ],
)
def test_what_is_no_reward_per_response_is_refused(results: object, problem: str) -> None:
    with pytest.raises((TypeError, ValueError), match=problem):
        judgements(results, 2, 1.0)
