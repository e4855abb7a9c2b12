"""One layer's experts in grouped products and in Megatron's loop: how far apart the two are."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from minpro_megatron.actor.backends.torch_backend import GroupedExperts
from minpro_megatron.gpu_checks.meter import relative_error


def experts_of(model: Any) -> Any:
    """The experts of the model's first layer."""
    return model.decoder.layers[0].mlp.experts


def differences_of_experts(
    experts: Any, counts: Sequence[int], device: torch.device, grouped: Any = GroupedExperts.forward
) -> dict[str, float]:
    """The largest difference, relative to the largest entry, of the output and of every gradient. `counts`: tokens of
    each expert. The gradient of an expert without tokens must be exactly 0."""
    torch.manual_seed(1)
    parameters = list(experts.parameters())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    shape, dtype = (sum(counts), parameters[0].shape[-1]), parameters[0].dtype
    rows, upstream = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    probs = torch.rand(sum(counts), device=device)
    found, expected = (
        _values_and_gradients(forward, experts, rows, torch.tensor(counts), probs, upstream)
        for forward in (grouped, SequentialMLP.forward)
    )
    assert {name for name in expected if "linear_fc" in name} == {name for name, _ in experts.named_parameters()}
    for name, one in expected.items():
        assert (found[name].dtype, found[name].shape) == (one.dtype, one.shape), name
    return {name: relative_error(found[name], expected[name]) for name in expected}


def _values_and_gradients(
    forward: Any, experts: Any, rows: Tensor, counts: Tensor, probs: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    rows, probs = rows.clone().requires_grad_(), probs.clone().requires_grad_()
    experts.zero_grad(set_to_none=True)
    output, _ = forward(experts, rows, counts, probs)
    output.backward(upstream)
    found: dict[str, Any] = {"output": output.detach(), "rows": rows.grad, "probs": probs.grad}
    found |= {name: parameter.grad for name, parameter in experts.named_parameters()}
    assert not any(value is None for value in found.values()), "an expert without tokens has a gradient of 0"
    experts.zero_grad(set_to_none=True)
    return found
