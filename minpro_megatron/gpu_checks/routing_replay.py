"""Scores and updates follow the experts that were recorded, also in layers that are recomputed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minpro_megatron.actor.policy import Policy
from minpro_megatron.gpu_checks.outcome import Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, make_policy
from minpro_megatron.parallel.mesh import Mesh

Maps = list[list[torch.Tensor]]  # by layer and call: bool [tokens, experts]


@dataclass(frozen=True)
class Shapes(Slice):
    learning_rate: float = 0.02  # large, so that the routers change their choices


FULL = (
    Shapes(
        layers=2, tokens=16384, sequence_tokens=4096, row_tokens=8192, vocabulary=32768, recompute="full",
        routing_replay=True,
    ),
    (
        Limit("scores_changed_by_replay", at_most=1e-2),
        Limit("update_passes_on_other_experts", at_most=0),
        Limit("score_passes_on_other_experts", at_most=0),
        Limit("free_passes_on_other_experts", at_least=1),
    ),
)  # fmt: skip
SMALL = (
    Shapes(
        layers=2,
        tokens=256,
        sequence_tokens=64,
        row_tokens=128,
        divisor=32,
        experts=32,
        vocabulary=300,
        recompute="full",
        routing_replay=True,
    ),
    FULL[1],
)


class RouteWitness:
    """Sees which experts the layers use, in the order of the forwards; recomputation in backward included."""

    def __init__(self, chunks: list[Any]) -> None:
        self._seen: Maps = []
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            maps: list[torch.Tensor] = []
            self._seen.append(maps)
            layer.mlp.router.register_forward_hook(
                lambda module, inputs, output, maps=maps: maps.append(output[1].detach().bool().cpu())
            )

    def take(self) -> Maps:
        """The maps since the last call."""
        taken = [list(maps) for maps in self._seen]
        for maps in self._seen:
            maps.clear()
        return taken


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...]) -> Outcome:
    """A pass is one layer's forward of one row. `free_passes_on_other_experts` shows that the update has moved the
    routers: without it the replay would prove nothing."""
    config = shapes.config(mesh.device.type)
    policy: Policy = make_policy(mesh, config, shapes.architecture())
    sequences = shapes.sequences()
    witness = RouteWitness(policy.modules)
    behavior, routes = policy.score_and_record(sequences)
    recorded = witness.take()
    unchanged = policy.score(sequences, routes)
    witness.take()
    policy.update(sequences, shapes.learning_rate, routes=routes)
    in_update = witness.take()
    policy.score(sequences)
    free = witness.take()
    policy.score(sequences, routes)
    in_score = witness.take()
    passes = [len(recorded[0]), len(in_update[0]), len(in_score[0])]
    expected = 2 if shapes.recompute == "full" else 1
    problems = []
    if passes != [passes[0], expected * passes[0], passes[0]]:
        problems.append(f"passes of a layer while recording, updating and scoring: {passes}")
    figures = {
        "scores_changed_by_replay": float(np.abs(unchanged - behavior).mean()),
        "update_passes_on_other_experts": _on_other_experts(in_update, recorded),
        "score_passes_on_other_experts": _on_other_experts(in_score, recorded),
        "free_passes_on_other_experts": _on_other_experts(free, recorded),
        "route_bytes": sum(chosen.nbytes for chosen in routes.chosen.values()),
    }
    return judged(figures, limits, problems)


def _on_other_experts(seen: Maps, recorded: Maps) -> int:
    """The number of passes whose experts are not those of any recorded pass of the layer."""
    return sum(
        not any(torch.equal(one, known) for known in of_layer)
        for passes, of_layer in zip(seen, recorded, strict=True)
        for one in passes
    )
