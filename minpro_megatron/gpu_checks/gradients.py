"""The gradient of a mini-batch, parameter by parameter, beside that of the same weights computed in another way."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minpro_megatron.gpu_checks.outcome import Limit

# One row would not show whether the gradient of the second is added to that of the first, or put in its place.
TWO_MICRO_BATCHES = Limit("micro_batches", at_least=2)
# Of one parameter. On a CPU, gradients in bfloat16 were up to 0.036 from those in float32, with the same weights and
# experts (two layers of the checks' model with a quarter of its width). Two ways to compute in bfloat16 may be twice
# that from each other. A micro-batch of two that is lost, or counted twice, is a difference of about 0.7.
IN_BFLOAT16 = Limit("gradient_error", at_most=0.1)
IN_FLOAT32 = Limit("gradient_error", at_most=1e-4)


class WorstGradient(NamedTuple):
    """The parameter whose gradient is the furthest from the expected one: |found - expected| over |expected|."""

    error: float
    parameter: str


def worst_gradient(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> WorstGradient:
    """The largest relative error over the parameters. It is infinite where a gradient is not finite, or not 0 where
    the expected one is 0."""
    assert found.keys() == expected.keys(), "the policies have different parameters"
    return max(WorstGradient(_relative_error(found[name], expected[name]), name) for name in expected)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    difference, size = (_norm(one) for one in (found - expected, expected))
    if not difference < float("inf"):
        return float("inf")
    return difference / size if size else (float("inf") if difference else 0.0)


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
