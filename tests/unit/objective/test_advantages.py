"""Advantages are the rewards of a group, centred and divided by their sample deviation."""

import statistics

import numpy as np
import pytest

from minpro_megatron.objective.advantages import group_advantages, overlong_penalty


@pytest.mark.parametrize("seed", range(10))
def test_advantages_equal_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    rewards = random.normal(3, 2, random.integers(2, 17)).tolist()
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)  # stdev: Bessel's correction
    expected = [(reward - mean) / (deviation + 1e-6) for reward in rewards]
    found = group_advantages(rewards)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_one_right_answer_among_eight() -> None:
    # mean 1/8, sample variance (7 * (1/8)^2 + (7/8)^2) / 7 = 1/8
    deviation = 0.125**0.5 + 1e-6
    expected = [0.875 / deviation] + [-0.125 / deviation] * 7
    np.testing.assert_allclose(group_advantages([1.0] + [0.0] * 7), expected, rtol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e30, -1e-30])
def test_equal_rewards_give_exact_zeros(reward: float) -> None:
    assert group_advantages([reward] * 7).tolist() == [0.0] * 7


def test_a_tiny_difference_is_damped_instead_of_blown_up() -> None:
    assert np.abs(group_advantages([0.5, 0.5 + 1e-9])).max() < 1e-3


def test_a_group_of_one_has_nothing_to_compare_with() -> None:
    assert group_advantages([3.0]).tolist() == [0.0]


@pytest.mark.parametrize("rewards", [[], [float("nan")], [1.0, float("nan")], [float("inf"), 0.0]])
def test_groups_that_have_no_advantage_are_refused(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="needs finite rewards, at least one"):
        group_advantages(rewards)


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.1), (90, -1.0), (99, -1.9), (100, -2.0), (140, -2.0)]
)
def test_the_overlong_penalty_falls_over_the_buffer_and_no_further(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(num_tokens, limit=100, buffer_tokens=20, scale=2.0) == pytest.approx(penalty, abs=1e-12)
