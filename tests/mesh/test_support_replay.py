"""On every mesh scoring and updating compute the softmax over the ids that truncated sampling kept."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from minpro_megatron.batching.supports import support_array
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.metrics.metric import Metric
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.records import StoredArray
from tests.mesh.conftest import Start
from tests.mesh.forced_routes import follow_routes, with_own_routes
from tests.mesh.harness import run_mesh
from tests.mesh.ragged_batch import DRIFT, in_order
from tests.mesh.reference import (
    COMMON,
    in_float64,
    is_kept,
    make_model,
    minpro_loss,
    reference_step,
    response_log_probs,
)
from tests.mesh.steps import LEARNING_RATE, SURVEY_SEED, TEMPERATURE, MeshStep, differences, step_config
from tests.mesh.stored_arrays import in_a_file
from tests.support.long_cases import long_rows_after

pytestmark = pytest.mark.mesh

TOP_K = 20
# kind of model, mesh, whether the supports lie in files
MESHES: list[tuple[str, dict[str, Any], bool]] = [
    ("tied", {"tensor": 2, "context": 2}, True),
    ("moe", {"pipeline": 2, "tensor": 2, "expert": 2}, False),
    ("dense", {"context": 2}, False),
    ("dense", {"tensor": 2}, True),
    ("moe", {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2}, True),
    ("dense", {}, False),
]


def with_own_supports(model: Any, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The sequences with a support for each token: its likeliest ids and its own; none for every 11th masked token, as
    if it was given. Their behavior log-probs lie around those of the restricted softmax."""
    random = np.random.default_rng(8)
    found = []
    for sequence in sequences:
        with torch.no_grad():
            ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
            logits = model(ids[None]).logits[0][len(sequence.prompt_ids) - 1 : -1].numpy()
        kept = []
        for place, (token, own) in enumerate(zip(sequence.response_ids, logits, strict=True)):
            likeliest = np.argsort(-own)[: random.integers(1, TOP_K)]
            is_given = sequence.loss_mask[place] == 0 and place % 11 == 0
            kept.append(np.empty(0, int) if is_given else random.permutation(np.union1d(likeliest, [token])))
        supports = support_array(np.array([len(one) for one in kept]), np.concatenate(kept))
        restricted = replace(sequence, supports=supports)
        with torch.no_grad():
            current = response_log_probs(model, restricted, TEMPERATURE).numpy()
        drift = random.normal(0, DRIFT, len(current))
        behavior = np.where(sequence.loss_mask > 0, current + drift, 37.0).astype(np.float32)
        found.append(replace(restricted, behavior_log_probs=behavior))
    return found


@dataclass(frozen=True)
class Replayed:
    """What a rank did."""

    log_probs: np.ndarray
    step: MeshStep
    metrics: dict[str, Metric]  # of all ranks


def _config(parallel: dict[str, Any], top_k: int = TOP_K, replay: str = "none") -> RunConfig:
    config = step_config(parallel)
    return config.model_copy(
        update={
            "sampling": config.sampling.model_copy(update={"top_k": top_k}),
            "model": config.model.model_copy(update={"routing_replay": replay}),
        }
    )


def _policy(mesh: Mesh, config: RunConfig, hf_path: str) -> Any:
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    features = ModelFeatures(routing_replay=config.model.routing_replay != "none")
    chunks = build_model(architecture, mesh, torch.float32, features)
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    return architecture, Policy(config, architecture, chunks, mesh)


def _replay(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list[TokenSequence]) -> Replayed:
    from minpro_megatron.metrics.metric import merge
    from tests.mesh.gradients import whole_gradients, whole_tensors

    architecture, policy = _policy(mesh, config, hf_path)
    log_probs = policy.score(sequences)
    result = policy.update(sequences, LEARNING_RATE, SURVEY_SEED)
    metrics = merge(mesh.from_all_ranks(result.metrics))
    loss = metrics["objective/loss"].value
    assert loss is not None
    gradients = whole_gradients(policy, architecture, mesh)
    weights = whole_tensors(policy, architecture, mesh)
    return Replayed(log_probs, MeshStep(loss, [result.grad_norm], gradients, weights), metrics)


def _check(model: Any, sequences: Sequence[TokenSequence], ranks: Sequence[Replayed], config: RunConfig) -> None:
    """Log-probs, update and metrics are those of transformers in float64."""
    with in_float64(model) as wide, torch.no_grad():
        expected = torch.cat([response_log_probs(wide, one, TEMPERATURE) for one in sequences]).numpy()
        sizes, masses = [], []
        for one in sequences:
            ids = torch.from_numpy(np.concatenate([one.prompt_ids, one.response_ids])).long()
            probs = (wide(ids[None]).logits[0] / TEMPERATURE).softmax(-1)[len(one.prompt_ids) - 1 : -1]
            kept, trained = is_kept(one, COMMON["vocab_size"]), one.loss_mask > 0
            sizes.append(kept.sum(1).numpy()[trained])
            masses.append((probs * kept).sum(1).numpy()[trained])
    optimizer = config.optimizer
    step = reference_step(model, sequences, minpro_loss("token_mean"), TEMPERATURE, LEARNING_RATE, optimizer)
    for rank in ranks:
        np.testing.assert_allclose(rank.log_probs, expected, atol=3e-5)
        assert rank.metrics["support/size"].value == pytest.approx(np.concatenate(sizes).mean(), rel=1e-12)
        assert rank.metrics["support/mass"].value == pytest.approx(np.concatenate(masses).mean(), rel=1e-5)
    assert differences(ranks[0].step, step).breaches == []


@pytest.mark.parametrize(("kind", "parallel", "in_file"), long_rows_after(1, MESHES), ids=str)
def test_scores_and_updates_are_those_of_the_kept_ids(
    kind: str, parallel: dict[str, Any], in_file: bool, starts: dict[str, Start], tmp_path: Path
) -> None:
    start = starts[kind]
    sequences = with_own_supports(start.model, in_order(start.groups))
    given = in_a_file(sequences, "supports", tmp_path / "0.bin") if in_file else sequences
    config = _config(parallel)
    ranks = run_mesh(_replay, config, start.hf_path, given, **parallel)
    _check(start.model, sequences, ranks, config)
    whole = run_mesh(_replay, _config(parallel, top_k=0), start.hf_path, given, **parallel)  # the wrong computation
    assert np.abs(whole[0].log_probs - ranks[0].log_probs).mean() > 0.2
    assert "support/mass" not in whole[0].metrics


@pytest.mark.long
def test_kept_ids_and_routes_of_the_servers_are_replayed_together(tmp_path: Path) -> None:
    model = make_model("moe")
    model.save_pretrained(tmp_path)
    from tests.mesh.reference import make_sequences

    sequences = with_own_supports(model, with_own_routes(model, make_sequences(11, 40)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.weight" in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std())
    model.save_pretrained(tmp_path)
    follow_routes(model, sequences)
    parallel = {"tensor": 2, "context": 2, "expert": 2}
    config = _config(parallel, replay="rollout")
    ranks = run_mesh(_replay, config, str(tmp_path), sequences, **parallel)
    _check(model, sequences, ranks, config)


def _refused(
    mesh: Mesh, config: RunConfig, hf_path: str, given: list[list[TokenSequence]], good: list[TokenSequence]
) -> list[str]:
    _, policy = _policy(mesh, config, hf_path)
    forwards: list[int] = []
    policy.modules[0].register_forward_pre_hook(lambda module, inputs: forwards.append(1))
    messages = []
    for sequences in given:
        for attempt in (policy.score, policy.inspect, lambda sequences: policy.update(sequences, LEARNING_RATE)):
            with pytest.raises(ValueError, match=r"^sampling\.top_k = 20: ") as refused:
                attempt(sequences)
        messages.append(str(refused.value))
    assert not forwards
    assert np.isfinite(policy.score(good)).all()
    return messages


def test_supports_that_do_not_fit_are_refused_by_every_rank_before_any_forward(
    starts: dict[str, Start], tmp_path: Path
) -> None:
    start = starts["dense"]
    sequences = with_own_supports(start.model, in_order(start.groups))
    place = max(range(len(sequences)), key=lambda one: sequences[one].num_tokens)
    good, num_tokens = sequences[place].supports, len(sequences[place].response_ids)
    assert isinstance(good, np.ndarray)
    sizes, ids = np.split(good, [num_tokens])
    stored = in_a_file(sequences, "supports", tmp_path / "0.bin")[place].supports
    assert isinstance(stored, StoredArray)
    broken = {
        "1 of 12 responses have no kept ids": None,
        "a sampled token is not among its kept ids": np.concatenate([np.roll(sizes, 1), np.roll(ids, sizes[-1])]),
        r"a kept id is outside the vocabulary of 77": np.concatenate([sizes, np.where(ids == ids[0], 77, ids)]),
        "those of another one": good[:-1],
        "these kept ids are damaged": msgspec.structs.replace(stored, offset=stored.offset + 4),
        "cannot be read": msgspec.structs.replace(stored, path=str(tmp_path / "none.bin")),
    }
    batches = []
    for wrong in broken.values():
        batches.append(list(sequences))
        batches[-1][place] = replace(sequences[place], supports=wrong)
    parallel = {"pipeline": 2, "data": 2}
    ranks = run_mesh(_refused, _config(parallel), start.hf_path, batches, sequences, **parallel)
    for messages in ranks:
        assert messages == ranks[0]
        for message, pattern in zip(messages, broken, strict=True):
            assert re.search(pattern, message), (pattern, message)
