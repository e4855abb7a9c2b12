"""A replayed forward takes the recorded routes on every mesh, and its gradient is that of those routes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_model, make_sequences
from tests.mesh.steps import step_config
from tests.support.long_cases import long_rows_after

pytestmark = pytest.mark.mesh

MESHES: list[tuple[dict[str, Any], str, bool]] = [
    ({"tensor": 2, "pipeline": 2, "expert": 2, "context": 2}, "full", True),
    ({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": (1, 1, 1, 2)}, "full", True),
    ({"data": 2, "expert": 2}, "none", False),
    ({}, "full", True),
    ({}, "first layer", True),
    ({"pipeline": 2, "virtual_pipeline": 2, "tensor": 2}, "selective", True),
]


class RouteWitness:
    """Sees which experts the layers really use, in the order of the forwards; recomputation in backward included."""

    def __init__(self, chunks: list[Any]) -> None:
        self.seen: list[list[np.ndarray]] = []
        self.places: list[int] = []  # of the layers in their chunks
        layers = [pair for chunk in chunks for pair in enumerate(chunk.decoder.layers)]
        for place, layer in layers:
            if not hasattr(layer.mlp, "router"):
                continue
            maps: list[np.ndarray] = []
            self.seen.append(maps)
            self.places.append(place)
            layer.mlp.router.register_forward_hook(
                lambda module, inputs, output, maps=maps: maps.append(output[1].detach().numpy().copy())
            )

    def take(self) -> list[list[np.ndarray]]:
        taken = [list(maps) for maps in self.seen]
        for maps in self.seen:
            maps.clear()
        return taken


def _same(one: list[list[np.ndarray]], other: list[list[np.ndarray]], passes: int) -> bool:
    """Each layer's routes of `other`, for each of its `passes` over the micro-batches, are those of `one`."""
    return all(
        len(again) == passes * len(first)
        and all(any(np.array_equal(route, known) for known in first) for route in again)
        and all(sum(np.array_equal(route, known) for route in again) % passes == 0 for known in first)
        for first, again in zip(one, other, strict=True)
    )


def _replay(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list) -> dict[str, Any]:
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    again = config.model.recompute_layers  # of each chunk; 0 is all
    features = ModelFeatures(config.model.recompute, recompute_layers=again, routing_replay=True)
    chunks = build_model(architecture, mesh, torch.float32, features)
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    policy = Policy(config, architecture, chunks, mesh)
    witness = RouteWitness(chunks)
    behavior, routes = policy.score_and_record(sequences)
    recorded = witness.take()
    unchanged = policy.score(sequences, routes)
    witness.take()
    policy.update(sequences, learning_rate=0.02, routes=routes)  # moves the routers far
    in_update = witness.take()
    policy.score(sequences)
    free = witness.take()
    replayed = policy.score(sequences, routes)
    in_score = witness.take()
    return {
        "behavior": behavior,
        "unchanged": unchanged,
        "replayed": replayed,
        "update_follows": all(
            _same(
                [before], [after], passes=2 if config.model.recompute == "full" and (not again or place < again) else 1
            )
            for place, before, after in zip(witness.places, recorded, in_update, strict=True)
        ),
        "score_follows": _same(recorded, in_score, passes=1),
        "free_differs": not _same(recorded, free, passes=1),
    }


@pytest.mark.parametrize(("parallel", "recompute", "packing"), long_rows_after(2, MESHES), ids=str)
def test_updates_and_scores_follow_the_recorded_routes(
    parallel: dict[str, Any], recompute: str, packing: bool, tmp_path: Path
) -> None:
    follow_recorded_routes(
        "moe of 5" if "pipeline_layers" in parallel else "moe", parallel, recompute, packing, tmp_path
    )


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    long_rows_after(
        1,
        [
            ({}, "first two layers"),
            ({"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2}, "full"),
        ],
    ),
    ids=str,
)
def test_layers_without_experts_have_no_routes(parallel: dict[str, Any], recompute: str, tmp_path: Path) -> None:
    follow_recorded_routes("glm", parallel, recompute, True, tmp_path)


def follow_recorded_routes(kind: str, parallel: dict[str, Any], recompute: str, packing: bool, tmp_path: Path) -> None:
    make_model(kind).save_pretrained(tmp_path)
    config = step_config(parallel, packing=packing, row_tokens=128)
    first = {"first layer": 1, "first two layers": 2}.get(recompute)
    chosen = {"recompute": "full", "recompute_layers": first} if first else {"recompute": recompute}
    config = config.model_copy(update={"model": config.model.model_copy(update=chosen)})
    sequences = make_sequences(11, 40)
    ranks = run_mesh(_replay, config, str(tmp_path), sequences, **parallel)
    for result in ranks:
        np.testing.assert_array_equal(result["unchanged"], result["behavior"])
        assert result["update_follows"]
        assert result["score_follows"]
        assert np.isfinite(result["replayed"]).all()
    assert any(result["free_differs"] for result in ranks)


def _misused(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list) -> list[str]:
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.actor.routing import Routes
    from minpro_megatron.models.architecture import read_architecture

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, torch.float32, ModelFeatures(routing_replay=True))
    policy = Policy(config, architecture, chunks, mesh)
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    _, routes = policy.score_and_record(sequences)
    broken = {
        "fewer layers": Routes({key: chosen[1:] for key, chosen in routes.chosen.items()}),
        "fewer tokens": Routes({key: chosen[:, 1:] for key, chosen in routes.chosen.items()}),
        "another micro-batch": Routes({}),
    }
    messages = []
    for name, wrong in broken.items():
        try:
            policy.score(sequences, wrong)
        except AssertionError as error:
            messages.append(f"{name}: {error}")
    policy.score(sequences)  # nothing is left behind
    return messages


def test_routes_of_another_shape_are_an_error(tmp_path: Path) -> None:
    make_model("moe").save_pretrained(tmp_path)
    sequences = [replace(sequence, loss_mask=np.ones_like(sequence.loss_mask)) for sequence in make_sequences(5, 12)]
    (messages,) = run_mesh(_misused, step_config({}, row_tokens=128), str(tmp_path), sequences)
    assert len(messages) == 3
    for message, part in zip(messages, ("routes of 3 layers for 4", "tokens for", "no routes of"), strict=True):
        assert part in message, messages
