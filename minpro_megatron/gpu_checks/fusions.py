"""Megatron's fusions on and off with Transformer Engine's layers: the same results, and what they save."""

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, make_policy
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
    rounds: int = 3


FULL = (
    Shapes(layers=2, tokens=16384, sequence_tokens=8192, row_tokens=16384, experts=64, vocabulary=32768),
    (
        Limit("mean_score_difference", at_most=0.02),
        Limit("grad_norm_difference", at_most=0.02),
        Limit("time_of_all_on_over_off", at_most=1.05),
    ),
)
SMALL = (
    Shapes(layers=1, tokens=128, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300, rounds=1),
    (Limit("mean_score_difference", at_most=1e-5), Limit("grad_norm_difference", at_most=1e-4)),
)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...], meter: Meter | None = None) -> Outcome:
    """All on, all off, and each alone switched off; differences are the largest of any variant from all on."""
    meter = meter or Meter(mesh.device)
    variants: dict[str, dict[str, Any]] = {"on": {}, "off": dict.fromkeys(FUSIONS, False)}
    variants |= {f"without_{name}": {name: False} for name in FUSIONS}
    sequences, figures = shapes.sequences(), dict[str, Figure]()
    results = {}
    for name, megatron in variants.items():
        policy = make_policy(mesh, shapes.config(mesh.device.type, **megatron), shapes.architecture())
        scores = policy.score(sequences)
        norm = policy.update(sequences, 0.0).grad_norm
        figures[f"{name}_update_s"] = meter.median_seconds(partial(policy.update, sequences, 0.0), shapes.rounds)
        results[name] = (scores, norm)
        del policy
        gc.collect()  # Megatron's optimizers are in reference cycles
    scores, norm = results["on"]
    figures["mean_score_difference"] = max(float(np.abs(one - scores).mean()) for one, _ in results.values())
    figures["grad_norm_difference"] = max(abs(one / norm - 1) for _, one in results.values())
    figures["time_of_all_on_over_off"] = float(figures["on_update_s"] or 0) / float(figures["off_update_s"] or 1)
    return judged(figures, limits)
