"""Megatron's fusions on and off with Transformer Engine's layers: the same results, and what they save."""

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from minpro_megatron.actor.routing import Routes
from minpro_megatron.gpu_checks.gradients import (
    IN_BFLOAT16,
    IN_FLOAT32,
    TWO_MICRO_BATCHES,
    WorstGradient,
    worst_gradient,
)
from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, accumulated_gradient, make_policy
from minpro_megatron.parallel.mesh import Mesh

# The fusions that the backend switches on (actor/backends/transformer_engine_backend.py).
FUSIONS = (
    "apply_rope_fusion",
    "moe_permute_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
)


@dataclass(frozen=True)
class Shapes(Slice):
    backend: str = "transformer_engine"
    routing_replay: bool = True
    rounds: int = 3


FULL = (
    Shapes(layers=2, tokens=16384, sequence_tokens=4096, row_tokens=8192, experts=64, vocabulary=32768),
    (
        TWO_MICRO_BATCHES,
        Limit("mean_score_difference", at_most=0.02),
        IN_BFLOAT16,
        Limit("grad_norm_difference", at_most=0.02),
        Limit("time_of_all_on_over_off", at_most=1.05),
    ),
)
SMALL = (
    Shapes(layers=1, tokens=256, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300, rounds=1),
    (
        TWO_MICRO_BATCHES,
        Limit("mean_score_difference", at_most=1e-5),
        IN_FLOAT32,
        Limit("grad_norm_difference", at_most=1e-4),
    ),
)


class Result(NamedTuple):
    """What a variant of the model computes; `worst` is its gradient beside that of all fusions on."""

    scores: np.ndarray
    grad_norm: float
    worst: WorstGradient


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...], meter: Meter | None = None) -> Outcome:
    """All on, all off, and each alone switched off; differences are the largest of any variant from all on. All follow
    the experts that were chosen with all on."""
    meter = meter or Meter(mesh.device)
    variants: dict[str, dict[str, Any]] = {"on": {}, "off": dict.fromkeys(FUSIONS, False)}
    variants |= {f"without_{name}": {name: False} for name in FUSIONS}
    sequences, architecture, figures = shapes.sequences(), shapes.architecture(), dict[str, Figure]()
    routes: Routes | None = None
    expected: dict[str, Tensor] = {}
    results: dict[str, Result] = {}
    for name, megatron in variants.items():
        policy = make_policy(mesh, shapes.config(mesh.device.type, **megatron), architecture)
        routes = routes or policy.score_and_record(sequences)[1]
        scores = policy.score(sequences, routes)
        gradient = accumulated_gradient(policy, architecture, mesh, sequences, routes)
        expected = expected or {parameter: values.clone() for parameter, values in gradient.items()}
        worst = worst_gradient(gradient, expected)
        norm = policy.update(sequences, 0.0, routes=routes).grad_norm
        figures[f"{name}_update_s"] = meter.median_seconds(partial(policy.update, sequences, 0.0), shapes.rounds)
        results[name] = Result(scores, norm, worst)
        del policy, gradient
        gc.collect()  # Megatron's optimizers are in reference cycles
    assert routes is not None
    return judged(figures | {"micro_batches": len(routes.chosen)} | _differences(results, figures), limits)


def _differences(results: dict[str, Result], figures: dict[str, Figure]) -> dict[str, Figure]:
    on = results["on"]
    variant = max(results, key=lambda name: results[name].worst)
    worst = results[variant].worst
    return {
        "mean_score_difference": max(float(np.abs(one.scores - on.scores).mean()) for one in results.values()),
        "gradient_error": worst.error,
        "worst_gradient": f"{variant}: {worst.parameter}",
        "grad_norm_difference": max(abs(one.grad_norm / on.grad_norm - 1) for one in results.values()),
        "time_of_all_on_over_off": float(figures["on_update_s"] or 0) / float(figures["off_update_s"] or 1),
    }
