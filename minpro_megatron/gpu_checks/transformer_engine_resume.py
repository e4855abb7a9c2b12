"""Transformer Engine's fused Adam continues from a checkpoint as it would have continued without one."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpro_megatron.gpu_checks.outcome import Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, copies_of_weights, count_different, make_policy, update_error
from minpro_megatron.parallel.mesh import Mesh

LEARNING_RATE, UPDATES = 1e-3, 3


@dataclass(frozen=True)
class Shapes(Slice):
    backend: str = "transformer_engine"


_LIMITS = (
    Limit("loaded_updates_error", at_most=0),
    Limit("loaded_weights_different", at_most=0),
    Limit("continued_error", at_most=0.02),
)
FULL = (
    Shapes(layers=1, tokens=8192, sequence_tokens=4096, row_tokens=8192, experts=16, vocabulary=32768),
    _LIMITS,
)
SMALL = (Shapes(layers=1, tokens=128, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300), _LIMITS)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...]) -> Outcome:
    """A new policy loads after three updates and makes two more, as the first one does. A count of updates that is not
    restored would change Adam's bias correction, which the first updates show most."""
    config, architecture, sequences = shapes.config(mesh.device.type), shapes.architecture(), shapes.sequences()
    policy = make_policy(mesh, config, architecture)
    for _ in range(UPDATES):
        policy.update(sequences, LEARNING_RATE)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    policy.save(folder).complete()
    saved = copies_of_weights(policy)
    for _ in range(2):
        policy.update(sequences, LEARNING_RATE)
    expected = copies_of_weights(policy)
    optimizer = _name_of_optimizer(policy)
    resumed = make_policy(mesh, config, architecture)
    updates = resumed.load(folder)
    different = count_different(resumed, saved)
    for _ in range(2):
        resumed.update(sequences, LEARNING_RATE)
    return judged(
        {
            "optimizer": optimizer,
            "loaded_updates_error": abs(updates - UPDATES),
            "loaded_weights_different": different,
            "continued_error": update_error(resumed, saved, expected),
        },
        limits,
    )


def _name_of_optimizer(policy: Any) -> str:
    parts = getattr(policy._optimizer, "chained_optimizers", [policy._optimizer])
    return ", ".join(sorted({f"{type(one.optimizer).__module__}.{type(one.optimizer).__name__}" for one in parts}))
