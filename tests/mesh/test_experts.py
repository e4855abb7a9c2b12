"""Experts in grouped products give what megatron's loop over experts gives; which of the two a model gets."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.reference import model_architecture

pytestmark = pytest.mark.mesh

COUNTS = [  # tokens of each of the eight experts
    [3, 1, 7, 2, 40, 5, 1, 6],
    [0, 4, 0, 0, 9, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 17],
    [0] * 8,  # of a rank whose experts nobody chose
]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # relative to the largest entry


def _largest_differences(mesh: Mesh) -> dict[tuple[torch.dtype, int], dict[str, float]]:
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.gpu_checks.expert_products import differences_of_experts, experts_of

    models = {dtype: build_model(model_architecture("moe"), mesh, dtype)[0] for dtype in TOLERANCE}
    return {
        (dtype, case): differences_of_experts(experts_of(model), counts, mesh.device)
        for dtype, model in models.items()
        for case, counts in enumerate(COUNTS)
    }


def test_grouped_products_equal_the_loop_in_values_and_gradients() -> None:
    (found,) = run_mesh(_largest_differences)
    assert len(found) == len(TOLERANCE) * len(COUNTS)
    for (dtype, case), differences in found.items():
        for name, difference in differences.items():
            assert difference <= TOLERANCE[dtype], (dtype, COUNTS[case], name)


def _kinds_of_experts(mesh: Mesh) -> list[str]:
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.gpu_checks.expert_products import experts_of

    wide = model_architecture("moe")
    narrow = replace(wide, expert_ffn_hidden_size=12)  # cut in two, its rows begin at multiples of 24 bytes
    return [
        type(experts_of(build_model(architecture, mesh, torch.float32)[0])).__name__ for architecture in (wide, narrow)
    ]


def test_matrices_that_the_grouped_product_refuses_get_the_loop() -> None:
    ranks = run_mesh(_kinds_of_experts, tensor=2, expert_tensor=2)
    assert ranks == [["GroupedExperts", "SequentialMLP"]] * 2


def test_the_rule_is_what_torch_takes() -> None:
    from minpro_megatron.actor.backends.torch_backend import grouped_product_works

    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for size in (4, 6, 8, 12, 16):
            rows, ends = torch.ones(5, size, dtype=dtype), torch.tensor([2, 5], dtype=torch.int32)
            try:
                torch.nn.functional.grouped_mm(rows, torch.ones(2, size, size, dtype=dtype), offs=ends)
                taken = True
            except (RuntimeError, ValueError):
                taken = False
            assert grouped_product_works(cpu, dtype, [16, size]) == taken, (dtype, size)


def test_an_expert_without_tokens_has_no_gradient_whatever_the_kernel_leaves_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On sm_100 grouped_mm leaves what was in memory where a group of a weight gradient is empty."""
    from minpro_megatron.actor.backends.torch_backend import _GroupedLinear

    right = torch.nn.functional.grouped_mm

    def as_on_sm_100(left: Tensor, other: Tensor, *, offs: Tensor) -> Tensor:
        product = right(left, other, offs=offs)
        if product.ndim == 3:
            product[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = torch.nan
        return product

    for counts in COUNTS:
        torch.manual_seed(1)
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        weights = [torch.randn(8, 16, requires_grad=True) for _ in counts]
        rows = torch.randn(sum(counts), 16, requires_grad=True)
        inputs, upstream = [rows, *weights], torch.randn(sum(counts), 8)
        expected = torch.autograd.grad(_GroupedLinear.apply(rows, ends, *weights), inputs, upstream)
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "grouped_mm", as_on_sm_100)
            found = torch.autograd.grad(_GroupedLinear.apply(rows, ends, *weights), inputs, upstream)
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=0)
        for count, gradient in zip(counts, found[1:], strict=True):
            assert bool(gradient.any()) == bool(count)
