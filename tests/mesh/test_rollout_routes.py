"""On every mesh scoring and updating follow the routes that came with the rollouts (R3)."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.records import StoredArray
from tests.mesh.forced_routes import follow_routes, with_own_routes
from tests.mesh.harness import run_mesh
from tests.mesh.reference import (
    ReferenceStep,
    make_model,
    make_sequences,
    minpro_loss,
    reference_step,
    response_log_probs,
)
from tests.mesh.steps import LEARNING_RATE, SURVEY_SEED, TEMPERATURE, MeshStep, differences, step_config
from tests.mesh.stored_arrays import in_a_file
from tests.support.long_cases import long_rows_after

pytestmark = pytest.mark.mesh

# mesh, recompute, packing, whether the routes lie in files
MESHES: list[tuple[dict[str, Any], str, bool, bool]] = [
    ({"tensor": 2, "pipeline": 2, "expert": 2, "context": 2}, "full", True, True),
    ({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": (1, 1, 1, 2)}, "selective", True, False),
    ({"tensor": 2, "context": 2, "expert": 4}, "none", False, False),
    ({}, "full", True, False),
    ({"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "expert": 2}, "full", True, True),
    ({"pipeline": 2, "pipeline_layers": (2, 3), "data": 2, "expert": 2}, "full", False, True),
]
EXPERTS = 8


@dataclass(frozen=True)
class Given:
    """Weights whose routers have moved since the rollouts, the rollouts with their routes, and what must come out."""

    hf_path: str
    sequences: list[TokenSequence]
    log_probs: np.ndarray
    free_log_probs: np.ndarray  # where the routers choose
    step: ReferenceStep


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def made(kind: str) -> Given:
        model, path = make_model(kind), tmp_path_factory.mktemp("moved")
        random = np.random.default_rng(3)
        sequences = [  # about what the model says of random tokens: ratios around 1
            replace(one, behavior_log_probs=random.normal(-4.5, 0.7, len(one.response_ids)).astype(np.float32))
            for one in with_own_routes(model, make_sequences(11, 40))
        ]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gate.weight" in name:
                    parameter.add_(torch.randn_like(parameter) * parameter.std())
        model.save_pretrained(path)
        free = _log_probs(model, sequences)
        follow_routes(model, sequences)
        loss, optimizer = minpro_loss("token_mean"), step_config({}).optimizer
        step = reference_step(model, sequences, loss, TEMPERATURE, LEARNING_RATE, optimizer)
        return Given(str(path), sequences, _log_probs(model, sequences), free, step)

    return made


@torch.no_grad()
def _log_probs(model: Any, sequences: Sequence[TokenSequence]) -> np.ndarray:
    return torch.cat([response_log_probs(model, one, TEMPERATURE) for one in sequences]).numpy()


@dataclass(frozen=True)
class Followed:
    """What a rank did. Routes: (layer of the model, its experts) of every slot, how often."""

    log_probs: np.ndarray
    step: MeshStep
    routes_of_score: Counter
    routes_of_update: Counter


def _policy(mesh: Mesh, config: RunConfig, hf_path: str) -> Any:
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    features = ModelFeatures(config.model.recompute, routing_replay=True)
    chunks = build_model(architecture, mesh, torch.float32, features)
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    return architecture, Policy(config, architecture, chunks, mesh)


def _follow(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list[TokenSequence]) -> Followed:
    from minpro_megatron.metrics.metric import merge
    from tests.mesh.gradients import whole_gradients, whole_tensors

    architecture, policy = _policy(mesh, config, hf_path)
    used: Counter = Counter()
    layers = [layer for chunk in policy.modules for layer in chunk.decoder.layers]
    for layer in (layer for layer in layers if hasattr(layer.mlp, "router")):

        def look(module: Any, inputs: Any, output: Any, layer: int = layer.layer_number - 1) -> None:
            used.update((layer, tuple(map(int, experts.nonzero()))) for experts in output[1])

        layer.mlp.router.register_forward_hook(look)
    log_probs, of_score = policy.score(sequences), Counter(used)
    used.clear()
    result = policy.update(sequences, LEARNING_RATE, SURVEY_SEED)
    loss = merge(mesh.from_all_ranks(result.metrics))["objective/loss"].value
    assert loss is not None
    gradients = whole_gradients(policy, architecture, mesh)
    weights = whole_tensors(policy, architecture, mesh)
    return Followed(log_probs, MeshStep(loss, [result.grad_norm], gradients, weights), of_score, used)


def _given_routes(sequences: Sequence[TokenSequence], dense_layers: int) -> Counter:
    return Counter(
        (layer, tuple(sorted(map(int, experts))))
        for sequence in sequences
        if isinstance(sequence.routed_experts, np.ndarray)
        for of_token in sequence.routed_experts
        for layer, experts in enumerate(of_token)
        if layer >= dense_layers
    )


def _config(parallel: dict[str, Any], recompute: str = "none", packing: bool = True) -> RunConfig:
    config = step_config(parallel, packing=packing, row_tokens=128)
    model = config.model.model_copy(update={"recompute": recompute, "routing_replay": "rollout"})
    return config.model_copy(update={"model": model})


@pytest.mark.parametrize(("parallel", "recompute", "packing", "in_file"), long_rows_after(2, MESHES), ids=str)
def test_scores_and_updates_are_those_of_the_given_routes(
    parallel: dict[str, Any], recompute: str, packing: bool, in_file: bool, given: Any, tmp_path: Path
) -> None:
    start: Given = given("moe of 5" if "pipeline_layers" in parallel else "moe")
    compare_with_given_routes(start, parallel, recompute, packing, in_file, EXPERTS, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        ({"pipeline": 2, "pipeline_layers": (1, 3), "tensor": 2, "expert": 2}, "full"),
        ({"context": 2, "expert": 2}, "none"),
    ],
    ids=str,
)
def test_routes_have_places_for_layers_without_experts(
    parallel: dict[str, Any], recompute: str, given: Any, tmp_path: Path
) -> None:
    start: Given = given("glm")
    compare_with_given_routes(start, parallel, recompute, True, False, 6, tmp_path, dense_layers=1)


def compare_with_given_routes(
    start: Given,
    parallel: dict[str, Any],
    recompute: str,
    packing: bool,
    in_file: bool,
    experts_of_model: int,
    tmp_path: Path,
    dense_layers: int = 0,
) -> None:
    assert np.abs(start.log_probs - start.free_log_probs).max() > 0.1
    sequences = in_a_file(start.sequences, "routed_experts", tmp_path / "0.bin") if in_file else start.sequences
    ranks = run_mesh(_follow, _config(parallel, recompute, packing), start.hf_path, sequences, **parallel)
    for rank in ranks:
        np.testing.assert_allclose(rank.log_probs, start.log_probs, atol=2e-5)
    assert differences(ranks[0].step, start.step).breaches == []
    # all ranks together ask for what was given, and beside it only for padding and each sequence's last token
    wanted = _given_routes(start.sequences, dense_layers)
    in_score = sum((rank.routes_of_score for rank in ranks), Counter())
    assert wanted <= in_score
    passes = 2 if recompute == "full" else 1
    assert sum((rank.routes_of_update for rank in ranks), Counter()) == Counter(
        {route: passes * count for route, count in in_score.items()}
    )
    of_padding = Counter[int]()
    for (_, experts), count in (in_score - wanted).items():
        of_padding.update(dict.fromkeys(experts, count))
    assert len(of_padding) == experts_of_model
    assert max(of_padding.values()) < 3 * min(of_padding.values())  # a few slots in each row


def _refused(
    mesh: Mesh, config: RunConfig, hf_path: str, given: list[list[TokenSequence]], good: list[TokenSequence]
) -> list[str]:
    _, policy = _policy(mesh, config, hf_path)
    forwards: list[int] = []
    policy.modules[0].register_forward_pre_hook(lambda module, inputs: forwards.append(1))
    before = [parameter.detach().clone() for chunk in policy.modules for parameter in chunk.parameters()]
    messages = []
    for sequences in given:
        for attempt in (policy.score, policy.inspect, lambda sequences: policy.update(sequences, LEARNING_RATE)):
            with pytest.raises(ValueError, match="routing_replay = rollout") as refused:
                attempt(sequences)
        messages.append(str(refused.value))
    assert not forwards
    after = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert np.isfinite(policy.score(good)).all()
    return messages


def test_routes_that_do_not_fit_are_refused_by_every_rank_before_any_forward(given: Any, tmp_path: Path) -> None:
    start: Given = given("moe")
    longest = max(range(len(start.sequences)), key=lambda place: start.sequences[place].num_tokens)
    routes = start.sequences[longest].routed_experts
    assert isinstance(routes, np.ndarray)
    stored = in_a_file(start.sequences, "routed_experts", tmp_path / "0.bin")[longest].routed_experts
    assert isinstance(stored, StoredArray)
    outside, twice = routes.copy(), routes.copy()
    outside[3, 2, 1], twice[3, 2] = EXPERTS, 4  # one token's, in the first row of one rank
    broken = {
        r"1 of 11 responses have no routes: they were sampled without this setting, or their routes have been": None,
        r"have the shape \(\d+, 3, 2\), but .* is \(\d+, 4, 2\) for .* 8 experts; serve the model": routes[:, :3],
        r"have the shape \(\d+, 4, 1\), but .* is \(\d+, 4, 2\)": routes[:, :, :1],
        r"have the shape .*, with all of the prompt's routes": routes[1:],
        r"layer 2: a server sent a token to expert 8, but the model's experts are 0 to 7": outside,
        r"layer 2: .* to the experts \[4, 4\], one of them twice: .*--enable-return-routed": twice,
        r"0.bin: these routes are damaged": msgspec.structs.replace(stored, offset=stored.offset + 1),
        r"none.bin: .* cannot be read": msgspec.structs.replace(stored, path=str(tmp_path / "none.bin")),
        r"to expert -1, but": np.where(outside == EXPERTS, np.int16(-1), outside),
    }
    batches = []
    for wrong in broken.values():
        batches.append(list(start.sequences))
        batches[-1][longest] = replace(start.sequences[longest], routed_experts=wrong)
    parallel = {"pipeline": 2, "data": 2}
    config = _config(parallel, packing=False)
    ranks = run_mesh(_refused, config, start.hf_path, batches, start.sequences, **parallel)
    for messages in ranks:
        assert messages == ranks[0]
        for message, pattern in zip(messages, broken, strict=True):
            assert re.search(pattern, message), (pattern, message)


def _dense(mesh: Mesh, hf_path: str) -> None:
    from minpro_megatron.actor.policy import Policy
    from tests.mesh.steps import loaded_model

    architecture, chunks = loaded_model(mesh, hf_path)
    with pytest.raises(ValueError, match="routing_replay = rollout: Qwen3ForCausalLM has no experts; set it to none"):
        Policy(_config({}), architecture, chunks, mesh)


def test_a_model_without_experts_has_no_routes(starts: dict) -> None:
    run_mesh(_dense, starts["dense"].hf_path)
