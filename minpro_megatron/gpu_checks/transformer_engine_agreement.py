"""Transformer Engine's layers against torch's, with the same weights: scores, and gradient norms of two updates."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minpro_megatron.actor.policy import Policy
from minpro_megatron.gpu_checks.outcome import Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, make_policy
from minpro_megatron.parallel.mesh import Mesh

LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Shapes(Slice):
    pass


# Two bfloat16 engines differ by about 1e-2 in a log-prob (actor/start_gate.py).
_LIMITS = (Limit("mean_score_difference", at_most=0.02), Limit("grad_norm_difference", at_most=0.05))
FULL = (
    Shapes(layers=2, tokens=8192, sequence_tokens=2048, row_tokens=8192, experts=64, vocabulary=32768),
    _LIMITS,
)
SMALL = (
    Shapes(layers=2, tokens=256, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300),
    (Limit("mean_score_difference", at_most=1e-5), Limit("grad_norm_difference", at_most=1e-4)),
)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...]) -> Outcome:
    """The weights of torch's layers reach the other ones by a checkpoint, which either backend loads."""
    sequences = shapes.sequences()
    expected = _policy(mesh, shapes, "torch")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    expected.save(folder).complete()
    found = _policy(mesh, shapes, "transformer_engine")
    found.load(folder)
    scores = [policy.score(sequences) for policy in (found, expected)]
    norms = [[policy.update(sequences, LEARNING_RATE).grad_norm for _ in range(2)] for policy in (found, expected)]
    return judged(
        {
            "mean_score_difference": float(np.abs(scores[0] - scores[1]).mean()),
            "largest_score_difference": float(np.abs(scores[0] - scores[1]).max()),
            "grad_norm_difference": max(abs(one / other - 1) for one, other in zip(*norms, strict=True)),
        },
        limits,
    )


def _policy(mesh: Mesh, shapes: Shapes, backend: str) -> Policy:
    chosen = replace(shapes, backend=backend)
    return make_policy(mesh, chosen.config(mesh.device.type), chosen.architecture())
