"""Grouped products over the experts, some of them without tokens, against Megatron's loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minpro_megatron.actor.backends.torch_backend import GroupedExperts
from minpro_megatron.actor.model import DTYPES, build_model, features_of
from minpro_megatron.gpu_checks.expert_products import differences_of_experts, experts_of
from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, fill_randomly
from minpro_megatron.parallel.mesh import Mesh


@dataclass(frozen=True)
class Shapes(Slice):
    rows: int = 0  # of all experts together
    rounds: int = 5


# bfloat16 rounds each of the two products of forward to 2^-8 of a value; the sums differ in order only
FULL = (
    Shapes(layers=1, tokens=64, sequence_tokens=64, row_tokens=64, vocabulary=1024, rows=65536),
    (Limit("largest_error", at_most=2**-6),),
)
SMALL = (
    Shapes(layers=1, tokens=64, sequence_tokens=64, row_tokens=64, divisor=32, vocabulary=300, rows=64, rounds=1),
    (Limit("largest_error", at_most=1e-5),),
)


def check(
    mesh: Mesh,
    shapes: Shapes,
    limits: tuple[Limit, ...],
    grouped: Any = GroupedExperts.forward,
    meter: Meter | None = None,
) -> Outcome:
    """`grouped` computes the experts as GroupedExperts.forward does."""
    meter = meter or Meter(mesh.device)
    config, architecture = shapes.config(mesh.device.type), shapes.architecture()
    dtype = DTYPES[config.model.dtype]
    (model,) = build_model(architecture, mesh, dtype, features_of(config))
    fill_randomly([model])
    experts = experts_of(model)
    if type(experts) is not GroupedExperts:
        return Outcome({}, [f"the layer has {type(experts).__name__} instead of grouped products"])
    worst, figures = ("none", 0.0), {}
    patterns = counts_of(shapes.rows, architecture.num_experts)
    for pattern, counts in patterns.items():
        differences = differences_of_experts(experts, counts, mesh.device, grouped)
        name = max(differences, key=lambda one: differences[one])
        figures[f"{pattern}_error"] = differences[name]
        worst = max(worst, (f"{name}, {pattern} counts", differences[name]), key=lambda one: one[1])
    figures |= {"largest_error": worst[1], "worst": worst[0]}
    figures |= _speed(experts, patterns["even"], dtype, shapes.rounds, meter)
    return judged(figures, limits)


def counts_of(rows: int, num_experts: int) -> dict[str, Sequence[int]]:
    """Numbers of tokens of each expert, which add up to `rows` in all but the last."""
    even = [rows // num_experts] * num_experts
    every_third = [0 if index % 3 else 3 * rows // num_experts for index in range(num_experts)]
    last = [0] * (num_experts - 1) + [rows]
    ragged = [index * 2 * rows // num_experts**2 for index in range(num_experts)]
    return {"even": even, "ragged": ragged, "empty": every_third, "one": last, "none": [0] * num_experts}


def _speed(experts: Any, counts: Sequence[int], dtype: torch.dtype, rounds: int, meter: Meter) -> dict[str, Figure]:
    """Milliseconds of forward and backward of even counts, and the share of the rate of a large product."""
    hidden = next(iter(experts.parameters())).shape[-1]
    rows = torch.randn(sum(counts), hidden, dtype=dtype, device=meter.device, requires_grad=True)
    probs, sizes = torch.rand(sum(counts), device=meter.device), torch.tensor(counts)

    def forward_and_backward() -> None:
        output, _ = experts(rows, sizes, probs)
        output.backward(torch.ones_like(output))

    forward_and_backward()
    seconds = meter.median_seconds(forward_and_backward, rounds)
    weights = sum(parameter.numel() for parameter in experts.parameters()) / len(counts)
    flops = 3 * 2 * sum(counts) * weights
    return {"both_ms": seconds * 1e3, "share_of_product_rate": flops / seconds / meter.product_rate(dtype)}
