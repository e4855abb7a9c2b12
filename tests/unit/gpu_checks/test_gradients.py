"""The worst of two models' gradients."""

import math

import pytest
import torch

from minpro_megatron.gpu_checks.gradients import worst_gradient

EXPECTED = {"large": torch.tensor([300.0, 400.0]), "small": torch.tensor([3e-6, 4e-6]), "none": torch.zeros(2)}


def with_gradient(name: str, values: list[float]) -> dict[str, torch.Tensor]:
    return EXPECTED | {name: torch.tensor(values)}


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("small", [3e-6, 6e-6], 0.4),  # the norm of all gradients is the same to 1e-8
        ("small", [4e-6, 3e-6], math.sqrt(0.08)),  # its own norm is the same, too
        ("large", [600.0, 800.0], 1.0),
        ("none", [0.0, 1e-30], math.inf),
        ("large", [math.nan, 400.0], math.inf),
        ("large", [math.inf, 400.0], math.inf),
    ],
)
def test_the_worst_parameter_is_named_with_its_relative_error(name: str, values: list[float], error: float) -> None:
    worst = worst_gradient(with_gradient(name, values), EXPECTED)
    assert worst.parameter == name
    assert worst.error == pytest.approx(error, rel=1e-5)


def test_equal_gradients_have_no_error() -> None:
    assert worst_gradient(EXPECTED, EXPECTED).error == 0
