"""One layer's experts in grouped products and in megatron's loop: how far apart the two are."""

from typing import Any

import torch
from torch import Tensor

COUNTS = [  # tokens of each of the eight experts
    [3, 1, 7, 2, 40, 5, 1, 6],
    [0, 4, 0, 0, 9, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 17],
    [0] * 8,  # of a rank whose experts nobody chose
]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # relative to the largest entry


def differences_of_experts(model: Any, counts: list[int], device: torch.device) -> dict[str, float]:
    """Of the output and of every gradient, between the two ways to compute one layer's experts."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from minpro_megatron.actor.backends.torch_backend import GroupedExperts

    experts = experts_of(model)
    assert type(experts) is GroupedExperts
    torch.manual_seed(1)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    shape, dtype = (sum(counts), model.config.hidden_size), model.config.params_dtype
    rows, upstream = (torch.randn(shape).to(device, dtype) for _ in range(2))
    probs = torch.rand(sum(counts)).to(device)
    grouped, looped = (
        _values_and_gradients(forward, experts, rows, torch.tensor(counts), probs, upstream)
        for forward in (GroupedExperts.forward, SequentialMLP.forward)
    )
    assert grouped.keys() == looped.keys()
    assert {name for name in grouped if "linear_fc" in name} == {name for name, _ in experts.named_parameters()}
    return {name: _relative(grouped[name], looped[name]) for name in grouped}


def experts_of(model: Any) -> Any:
    return model.decoder.layers[0].mlp.experts


def _values_and_gradients(
    forward: Any, experts: Any, rows: Tensor, counts: Tensor, probs: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    rows, probs = rows.clone().requires_grad_(), probs.clone().requires_grad_()
    experts.zero_grad(set_to_none=True)
    output, bias = forward(experts, rows, counts, probs)
    assert bias is None
    output.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    assert not any(gradient is None for gradient in gradients.values()), "an expert without tokens has a gradient of 0"
    return {"output": output.detach(), "rows": rows.grad, "probs": probs.grad, **gradients}  # type: ignore[dict-item]


def _relative(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if not expected.numel() or not expected.any():
        return 0.0 if not found.any() else float("inf")
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
