"""Transformer Engine's layers against torch's, with the same weights: scores, gradients and norms of two updates."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minpro_megatron.actor.policy import Policy
from minpro_megatron.gpu_checks.gradients import (
    IN_BFLOAT16,
    IN_FLOAT32,
    TWO_MICRO_BATCHES,
    worst_gradient,
)
from minpro_megatron.gpu_checks.outcome import Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, accumulated_gradient, make_policy
from minpro_megatron.parallel.mesh import Mesh

LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Shapes(Slice):
    routing_replay: bool = True


FULL = (
    Shapes(layers=2, tokens=8192, sequence_tokens=2048, row_tokens=4096, experts=64, vocabulary=32768),
    (
        TWO_MICRO_BATCHES,
        # two bfloat16 engines differ by about 1e-2 in a log-prob (actor/start_gate.py)
        Limit("mean_score_difference", at_most=0.02),
        IN_BFLOAT16,
        Limit("grad_norm_difference", at_most=0.05),
    ),
)
SMALL = (
    Shapes(layers=2, tokens=256, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300),
    (
        TWO_MICRO_BATCHES,
        Limit("mean_score_difference", at_most=1e-5),
        IN_FLOAT32,
        Limit("grad_norm_difference", at_most=1e-4),
    ),
)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...]) -> Outcome:
    """The weights of torch's layers reach the other ones by a checkpoint, which either backend loads. Gradients are
    compared with the experts that torch's layers chose; scores and norms are those of each one's own choice."""
    sequences, architecture = shapes.sequences(), shapes.architecture()
    expected = _policy(mesh, shapes, "torch")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    expected.save(folder).complete()
    found = _policy(mesh, shapes, "transformer_engine")
    found.load(folder)
    expected_scores, routes = expected.score_and_record(sequences)
    differences = np.abs(found.score(sequences) - expected_scores)
    gradients = [accumulated_gradient(policy, architecture, mesh, sequences, routes) for policy in (found, expected)]
    worst = worst_gradient(*gradients)
    norms = [[policy.update(sequences, LEARNING_RATE).grad_norm for _ in range(2)] for policy in (found, expected)]
    return judged(
        {
            "micro_batches": len(routes.chosen),
            "mean_score_difference": float(differences.mean()),
            "largest_score_difference": float(differences.max()),
            "gradient_error": worst.error,
            "worst_gradient": worst.parameter,
            "grad_norm_difference": max(abs(one / other - 1) for one, other in zip(*norms, strict=True)),
        },
        limits,
    )


def _policy(mesh: Mesh, shapes: Shapes, backend: str) -> Policy:
    chosen = replace(shapes, backend=backend)
    return make_policy(mesh, chosen.config(mesh.device.type), chosen.architecture())
