"""The learning rate of every global step, and what the settings of schedules refuse."""

import math

import pytest
from pydantic import ValidationError

from minpro_megatron.actor.learning_rate import effective_sample_size_factor, learning_rate_at
from minpro_megatron.config.optimizer import OptimizerConfig


def rates(count: int, **settings: object) -> list[float]:
    config = OptimizerConfig.model_validate({"learning_rate": 4.0, "warmup_global_steps": 2} | settings)
    return [learning_rate_at(config, step) for step in range(count)]


def test_the_default_is_constant_after_the_warm_up() -> None:
    assert rates(5) == [2.0, 4.0, 4.0, 4.0, 4.0]
    assert rates(2, warmup_global_steps=0) == [4.0, 4.0]
    assert learning_rate_at(OptimizerConfig(), 10**6) == 1e-6


def test_a_linear_decay_reaches_its_floor_and_stays_there() -> None:
    decay = {"schedule": "linear", "decay_global_steps": 6}
    assert rates(8, **decay) == [2.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0]
    assert rates(8, **decay, min_learning_rate=2.0) == [2.0, 4.0, 3.5, 3.0, 2.5, 2.0, 2.0, 2.0]
    assert rates(3, **decay | {"decay_global_steps": 4}, warmup_global_steps=0) == [3.0, 2.0, 1.0]


def test_a_cosine_decay_is_half_a_period() -> None:
    found = rates(8, schedule="cosine", decay_global_steps=6, min_learning_rate=1.0)
    half = math.sqrt(0.5)
    assert found == pytest.approx([2.0, 4.0, 2.5 + 1.5 * half, 2.5, 2.5 - 1.5 * half, 1.0, 1.0, 1.0], rel=1e-15)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"schedule": "linear"}, "decay_global_steps is null: schedule = linear needs"),
        ({"schedule": "cosine", "decay_global_steps": 2}, "decay_global_steps = 2 must exceed warmup_global_steps = 2"),
        ({"min_learning_rate": 5.0}, "min_learning_rate = 5.0 must not exceed learning_rate = 4.0"),
        ({"schedule": "wsd"}, "schedule"),
        ({"reference_effective_sample_size": 0.0}, "reference_effective_sample_size"),
    ],
)
def test_schedules_that_cannot_be_are_refused(settings: dict, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        rates(1, **settings)


def test_few_heavy_sequences_lower_the_learning_rate() -> None:
    weights = [1.0, 1.0, 1.0, 5.0]
    mean, square_mean = sum(weights) / 4, sum(weight**2 for weight in weights) / 4
    share = sum(weights) ** 2 / (4 * sum(weight**2 for weight in weights))
    assert effective_sample_size_factor(mean, square_mean, 1.0) == pytest.approx(math.sqrt(share), rel=1e-15)
    assert effective_sample_size_factor(mean, square_mean, 0.8) == pytest.approx(math.sqrt(share / 0.8), rel=1e-15)
    assert effective_sample_size_factor(mean, square_mean, 0.5) == 1.0  # it never raises the rate
    assert effective_sample_size_factor(1.0, 1.0, 1.0) == 1.0
