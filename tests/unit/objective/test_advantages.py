"""Advantages of the estimators, against their definitions as loops over float64 numbers."""

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from minpro_megatron.objective.advantages import ADVANTAGES, group_advantages, overlong_penalty


def normalized_loop(rewards: Sequence[float]) -> list[float]:
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)  # stdev: Bessel's correction
    return [(reward - mean) / (deviation + 1e-6) for reward in rewards]


def mean_loop(rewards: Sequence[float]) -> list[float]:
    return [reward - statistics.fmean(rewards) for reward in rewards]


def leave_one_out_loop(rewards: Sequence[float]) -> list[float]:
    return [
        reward - statistics.fmean([other for place, other in enumerate(rewards) if place != own])
        for own, reward in enumerate(rewards)
    ]


LOOPS = {"group_normalized": normalized_loop, "group_mean": mean_loop, "leave_one_out": leave_one_out_loop}


def test_every_estimator_has_a_loop() -> None:
    assert LOOPS.keys() == ADVANTAGES.keys()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("name", "loop"), LOOPS.items())
def test_advantages_equal_the_definition(name: str, loop: Callable[[Sequence[float]], list[float]], seed: int) -> None:
    random = np.random.default_rng(seed)
    rewards = random.normal(3, 2, random.integers(2, 17))
    np.testing.assert_allclose(ADVANTAGES[name](rewards), loop(rewards.tolist()), rtol=1e-13, atol=1e-14)
    found = group_advantages(rewards.tolist(), name)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, loop(rewards.tolist()), rtol=1e-6, atol=1e-7)


# mean 1/8, sample variance (7 * (1/8)^2 + (7/8)^2) / 7 = 1/8; the others of the right answer have the mean 0, those of
# a wrong one 1/7
ONE_OF_EIGHT = {
    "group_normalized": [0.875 / (0.125**0.5 + 1e-6)] + [-0.125 / (0.125**0.5 + 1e-6)] * 7,
    "group_mean": [0.875] + [-0.125] * 7,
    "leave_one_out": [1.0] + [-1 / 7] * 7,
}


@pytest.mark.parametrize(("name", "expected"), ONE_OF_EIGHT.items())
def test_one_right_answer_among_eight(name: str, expected: list[float]) -> None:
    np.testing.assert_allclose(group_advantages([1.0] + [0.0] * 7, name), expected, rtol=1e-6)


def test_the_default_is_the_normalized_advantage() -> None:
    assert group_advantages([3.0, 1.0, 0.5]).tolist() == group_advantages([3.0, 1.0, 0.5], "group_normalized").tolist()


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e30, -1e-30])
def test_equal_rewards_give_exact_zeros(name: str, reward: float) -> None:
    assert group_advantages([reward] * 7, name).tolist() == [0.0] * 7


def test_a_tiny_difference_is_damped_instead_of_blown_up() -> None:
    assert np.abs(group_advantages([0.5, 0.5 + 1e-9])).max() < 1e-3


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_one_has_nothing_to_compare_with(name: str) -> None:
    assert group_advantages([3.0], name).tolist() == [0.0]
    assert ADVANTAGES[name](np.array([3.0])).tolist() == [0.0]


@pytest.mark.parametrize("rewards", [[], [float("nan")], [1.0, float("nan")], [float("inf"), 0.0]])
def test_groups_that_have_no_advantage_are_refused(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="needs finite rewards, at least one"):
        group_advantages(rewards)


def test_an_unknown_estimator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"estimator = 'gae': there is no such estimator; known: group_normalized, "):
        group_advantages([1.0, 0.0], "gae")


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.1), (90, -1.0), (99, -1.9), (100, -2.0), (140, -2.0)]
)
def test_the_overlong_penalty_falls_over_the_buffer_and_no_further(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(num_tokens, limit=100, buffer_tokens=20, scale=2.0) == pytest.approx(penalty, abs=1e-12)
