"""The log-prob kernel: right against float64, and its time and memory beside the other ways."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from minpro_megatron.gpu_checks.log_prob_ways import (
    Problem,
    Way,
    forward_and_backward,
    in_chunks,
    in_float64,
    make_problem,
    naive,
    ours,
    verl_torch,
    verl_triton,
)
from minpro_megatron.gpu_checks.meter import Meter, relative_error
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged


@dataclass(frozen=True)
class Shapes:
    tokens: int
    vocabulary: int
    hidden: int
    dtype: str
    rounds: int


# The differences are those of bfloat16 inputs with sums in float32: the gradient of the logits is rounded to bfloat16.
# The time and the memory are the aims of benchmarks/log_probs.md; the share counts the three products that any way
# needs, and ours makes a fourth.
FULL = (
    Shapes(tokens=8192, vocabulary=151_936, hidden=2048, dtype="bfloat16", rounds=5),
    (
        Limit("log_prob_error", at_most=1e-3),
        Limit("entropy_error", at_most=1e-3),
        Limit("d_hidden_error", at_most=0.01),
        Limit("d_weight_error", at_most=0.01),
        Limit("share_of_product_rate", at_least=0.6),
        Limit("time_over_naive", at_most=1.1),
        Limit("bytes_over_naive", at_most=0.5),
    ),
)
SMALL = (
    Shapes(tokens=96, vocabulary=1000, hidden=32, dtype="float32", rounds=1),
    (
        Limit("log_prob_error", at_most=1e-4),
        Limit("entropy_error", at_most=1e-4),
        Limit("d_hidden_error", at_most=1e-4),
        Limit("d_weight_error", at_most=1e-4),
    ),
)


def check(
    device: torch.device,
    shapes: Shapes,
    limits: tuple[Limit, ...],
    kernel: Way = ours,
    meter: Meter | None = None,
) -> Outcome:
    """`kernel` against float64 and beside the other ways. The errors of log-probs and entropies are in nats, those of
    the gradients relative to the largest entry."""
    meter = meter or Meter(device)
    dtype = getattr(torch, shapes.dtype)
    problem = make_problem(shapes.tokens, shapes.vocabulary, shapes.hidden, dtype, device)
    figures: dict[str, Figure] = errors(problem, kernel)
    rate = meter.product_rate(dtype)
    figures["product_tflops"] = rate / 1e12
    for name, way in {"ours": kernel, **_other_ways(device)}.items():
        figures |= _time_and_memory(name, problem, way, shapes.rounds, meter)
    spent_s = sum(_number(figures[f"ours_{part}_ms"]) for part in ("forward", "backward")) / 1e3
    naive_s = sum(_number(figures[f"naive_{part}_ms"]) for part in ("forward", "backward")) / 1e3
    figures["share_of_product_rate"] = 3 * problem.flops_of_a_product / spent_s / rate
    figures["time_over_naive"] = spent_s / naive_s
    own, others = figures["ours_extra_bytes"], figures["naive_extra_bytes"]
    figures["bytes_over_naive"] = None if own is None else _number(own) / _number(others)
    return judged(figures, limits)


def errors(problem: Problem, kernel: Way) -> dict[str, Figure]:
    """The largest differences of `kernel` from float64."""
    log_probs, entropies, d_hidden, d_weight = forward_and_backward(problem, kernel)
    expected = in_float64(problem)
    return {
        "log_prob_error": (log_probs - expected[0]).abs().max().item(),
        "entropy_error": (entropies - expected[1]).abs().max().item(),
        "d_hidden_error": relative_error(d_hidden, expected[2]),
        "d_weight_error": relative_error(d_weight, expected[3]),
    }


def _other_ways(device: torch.device) -> dict[str, Way]:
    ways: dict[str, Way] = {"naive": naive, "chunks": in_chunks}
    if find_spec("verl") is not None:
        ways["verl_torch"] = verl_torch
        if device.type == "cuda":
            ways["verl_triton"] = verl_triton
    return ways


def _time_and_memory(name: str, problem: Problem, way: Way, rounds: int, meter: Meter) -> dict[str, Figure]:
    """Milliseconds of forward and backward, and the peak above the inputs and the returned gradients."""
    inputs = (problem.hidden_TH, problem.weight_VH)
    peak = meter.peak_bytes(lambda: forward_and_backward(problem, way))  # also compiles
    forward_s = meter.median_seconds(lambda: way(problem), rounds)
    both_s = meter.median_seconds(lambda: forward_and_backward(problem, way), rounds)
    gradients = sum(tensor.nbytes for tensor in inputs)
    return {
        f"{name}_forward_ms": forward_s * 1e3,
        f"{name}_backward_ms": max(0.0, both_s - forward_s) * 1e3,
        f"{name}_extra_bytes": None if peak is None else peak - gradients,
    }


def _number(figure: Figure) -> float:
    assert figure is not None
    return float(figure)
