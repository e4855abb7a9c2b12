"""The comparison of a mesh's step with the reference finds what it is there for."""

from dataclasses import replace

import pytest
import torch

from tests.mesh.reference import ReferenceStep
from tests.mesh.steps import Differences, MeshStep, differences

START = {"a": torch.linspace(-1, 1, 60).view(6, 10), "b": torch.ones(4)}
GRADIENTS = {"a": torch.linspace(1, -2, 60).view(6, 10), "b": torch.zeros(4)}
UPDATED = {name: tensor + 1e-3 * torch.sign(tensor) for name, tensor in START.items()}
EXPECTED = ReferenceStep(loss=0.3, grad_norm=2.0, gradients=GRADIENTS, start=START, updated=UPDATED)
SAME = MeshStep(
    loss=0.3,
    grad_norms=[2.0, 2.0],
    gradients={name: tensor.numpy() for name, tensor in GRADIENTS.items()},
    weights={name: tensor.numpy() for name, tensor in UPDATED.items()},
)


def test_the_same_step_has_no_breaches() -> None:
    assert differences(SAME, EXPECTED).breaches == []


@pytest.mark.parametrize(
    ("other", "breach"),
    [
        (replace(SAME, loss=0.3 * (1 + 2e-5)), "loss: off by 2.00e-05, allowed 1e-05"),
        (replace(SAME, grad_norms=[2.0, 2.0 * (1 + 2e-5)]), "gradient norm: off by 2.00e-05"),
        (replace(SAME, gradients=SAME.gradients | {"a": SAME.gradients["a"] + 3e-5}), "gradient of a: off by 1.5"),
        (replace(SAME, gradients=SAME.gradients | {"b": SAME.gradients["b"] + 1e-9}), "gradient of b: off by inf"),
        # a skipped update, and one of the wrong size
        (replace(SAME, weights={name: tensor.numpy() for name, tensor in START.items()}), "update: off by 1.00e+00"),
        (replace(SAME, weights={name: tensor.numpy() * 1.00001 for name, tensor in UPDATED.items()}), "update: off by"),
    ],
    ids=["loss", "norm on one rank", "gradient", "gradient where there is none", "skipped", "other update"],
)
def test_what_differs_is_named(other: MeshStep, breach: str) -> None:
    (found,) = differences(other, EXPECTED).breaches
    assert found.startswith(breach)


def test_a_missing_tensor_and_nan_are_no_difference_but_an_error() -> None:
    with pytest.raises(AssertionError):
        differences(replace(SAME, gradients={"a": SAME.gradients["a"]}), EXPECTED)
    with pytest.raises(AssertionError):
        Differences(loss=float("nan"), grad_norm=0, gradient=0, worst_tensor="a", update=0)
