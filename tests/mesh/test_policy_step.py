"""One MinPRO step on many meshes equals transformers + autograd + AdamW on one process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.reference import (
    ReferenceStep,
    make_model,
    make_sequences,
    reference_step,
    response_log_probs,
    saved_tensors,
)

pytestmark = pytest.mark.mesh

TEMPERATURE, LEARNING_RATE = 0.8, 1e-3

MESHES = [
    ("moe", {}, True),
    ("moe", {"tensor": 2, "expert": 2}, True),
    ("moe", {"context": 2}, True),
    ("moe", {"data": 2, "expert": 2}, False),
    ("moe", {"tensor": 2, "context": 2, "expert": 2}, True),
    ("moe", {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2}, True),
    ("moe", {"expert_tensor": 2, "tensor": 2}, True),
    ("moe", {"tensor": 2, "pipeline": 2, "context": 2, "expert": 2}, True),
    ("dense", {"tensor": 2, "context": 2, "data": 2}, True),
    ("dense", {"pipeline": 2, "data": 2}, False),
    ("tied", {"pipeline": 2, "tensor": 2}, True),
    ("moe by sequence", {"tensor": 2, "context": 2}, True),
]
# name -> (model, aggregation)
KINDS = {
    "moe": ("moe", "token_mean"),
    "dense": ("dense", "token_mean"),
    "tied": ("tied", "token_mean"),
    "moe by sequence": ("moe", "sequence_mean"),
}


def _config(parallel: dict[str, int], packing: bool, aggregation: str = "token_mean") -> RunConfig:
    return parse_run_config(
        {
            "name": "mesh-test",
            "device": "cpu",
            "model": {"hf_path": "unused", "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "parallel": parallel,
            "objective": {"name": "minpro", "aggregation": aggregation},
            "sampling": {"temperature": TEMPERATURE, "max_prompt_tokens": 16, "max_response_tokens": 64},
            "batch": {
                "num_prompts": 8,
                "mini_batch_prompts": 8,
                "max_tokens_per_row": 128,
                "packing": packing,
            },
        }
    )


def _loaded(mesh: Mesh, hf_path: str) -> tuple:
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.weights.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, torch.float32)
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    return architecture, chunks


def _step(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list) -> dict:
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.monitor.metrics import merge
    from minpro_megatron.weights.gather import WeightGatherer

    architecture, chunks = _loaded(mesh, hf_path)
    policy = Policy(config, architecture, chunks, mesh)
    before = policy.score(sequences)
    policy.keep_weights("sampling")
    result = policy.update(sequences, LEARNING_RATE)
    with policy.kept_weights("sampling"):
        kept = policy.score(sequences)
    after = policy.score(sequences)
    metrics = merge(mesh.from_all_ranks(result.metrics))
    buckets = WeightGatherer(chunks, architecture, mesh).buckets(bucket_bytes=20_000)
    # numpy: a tensor sent through a queue lives only as long as the process that made it
    weights = {name: tensor.numpy().copy() for bucket in buckets for name, tensor in bucket}
    values = {name: metric.value for name, metric in metrics.items()}
    return {
        "before": before,
        "kept": kept,
        "after": after,
        "grad_norm": result.grad_norm,
        "metrics": values,
        "weights": weights,
    }


@pytest.fixture(scope="module")
def references(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, list, np.ndarray, ReferenceStep, dict]]:
    made = {}
    for kind, (architecture, aggregation) in KINDS.items():
        model = make_model(architecture)
        path = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(path)
        start = saved_tensors(model)
        noise = np.random.default_rng(7)
        sequences, log_probs = [], []
        with torch.no_grad():
            for sequence in make_sequences(11, 40):
                current = response_log_probs(model, sequence, TEMPERATURE).numpy()
                log_probs.append(current)
                drift = noise.normal(0, 0.7, len(current)).astype(np.float32)
                sequences.append(replace(sequence, behavior_log_probs=current + drift))
        step = reference_step(model, sequences, TEMPERATURE, LEARNING_RATE, 1.0, aggregation)
        made[kind] = (path, sequences, np.concatenate(log_probs), step, start)
    return made


@pytest.mark.parametrize(("kind", "parallel", "packing"), MESHES, ids=str)
def test_step_equals_transformers(kind: str, parallel: dict[str, int], packing: bool, references: dict) -> None:
    path, sequences, log_probs, expected, start = references[kind]
    ranks = run_mesh(_step, _config(parallel, packing, KINDS[kind][1]), str(path), sequences, **parallel)
    for result in ranks:
        np.testing.assert_allclose(result["before"], log_probs, atol=2e-5)
        np.testing.assert_array_equal(result["kept"], result["before"])
        assert np.abs(result["after"] - result["before"]).max() > 1e-3
        assert result["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
        assert result["metrics"]["objective/loss"] == pytest.approx(expected.loss, rel=1e-5)
    weights = ranks[0]["weights"]
    assert weights.keys() == start.keys()
    difference = sum(float((torch.from_numpy(weights[n]) - expected.updated[n]).norm() ** 2) for n in weights) ** 0.5
    update = sum(float((expected.updated[n] - start[n]).norm() ** 2) for n in weights) ** 0.5
    assert difference <= 1e-3 * update


def _step_on_nan(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list) -> tuple[str | None, bool]:
    from minpro_megatron.actor.policy import Policy

    architecture, chunks = _loaded(mesh, hf_path)
    policy = Policy(config, architecture, chunks, mesh)
    before = [parameter.detach().clone() for chunk in policy.modules for parameter in chunk.parameters()]
    result = policy.update([replace(sequences[0], advantage=float("nan")), *sequences[1:]], LEARNING_RATE)
    after = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    return result.skipped, all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_update_with_nan_gradient_is_skipped_on_every_rank(references: dict) -> None:
    path, sequences, *_ = references["moe"]
    config = _config({"tensor": 2, "expert": 2}, True)
    ranks = run_mesh(_step_on_nan, config, str(path), sequences, tensor=2, expert=2)
    assert ranks == [("gradient not finite", True)] * 2


def _misuse_while_swapped(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list) -> None:
    from minpro_megatron.actor.policy import Policy

    architecture, chunks = _loaded(mesh, hf_path)
    policy = Policy(config, architecture, chunks, mesh)
    with pytest.raises(AssertionError, match="comes first"), policy.kept_weights("sampling"):
        pass
    policy.keep_weights("sampling")
    policy.update(sequences, LEARNING_RATE)
    trained = [parameter.detach().clone() for chunk in policy.modules for parameter in chunk.parameters()]
    with policy.kept_weights("sampling"):
        for misuse in (lambda: policy.keep_weights("other"), policy.kept_weights("sampling").__enter__):
            with pytest.raises(AssertionError, match="swapped in"):
                misuse()
        with pytest.raises(AssertionError, match="swapped in"):
            policy.update(sequences, LEARNING_RATE)
    with pytest.raises(KeyError), policy.kept_weights("sampling"):
        raise KeyError("scoring failed")
    after = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(trained, after, strict=True))
    policy.keep_weights("sampling")  # allowed again


def test_nothing_but_scoring_is_allowed_with_the_sampling_weights_swapped_in(references: dict) -> None:
    path, sequences, *_ = references["dense"]
    run_mesh(_misuse_while_swapped, _config({}, True), str(path), sequences)
