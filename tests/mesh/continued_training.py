"""Training that is saved on one mesh and continued on another."""

from pathlib import Path
from typing import Any

from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.steps import loaded_model

LEARNING_RATE = 1e-3


def _policy(mesh: Mesh, config: RunConfig, hf_path: str) -> Any:
    from minpro_megatron.actor.policy import Policy

    architecture, chunks = loaded_model(mesh, hf_path)
    return architecture, Policy(config, architecture, chunks, mesh)


def train_and_save(mesh: Mesh, config: RunConfig, hf_path: str, folder: str, sequences: list) -> dict[str, Any]:
    architecture, policy = _policy(mesh, config, hf_path)
    for _ in range(2):
        policy.update(sequences, LEARNING_RATE)
    policy.save(Path(folder)).complete()
    return _continued(mesh, architecture, policy, sequences)


def resume(mesh: Mesh, config: RunConfig, hf_path: str, folder: str, sequences: list) -> dict[str, Any]:
    architecture, policy = _policy(mesh, config, hf_path)
    policy.update(sequences[:3], 0.05)  # weights, moments and step are all other than those saved
    policy.load(Path(folder))
    return _continued(mesh, architecture, policy, sequences)


def resume_from_nothing(mesh: Mesh, config: RunConfig, hf_path: str, folder: str, sequences: list) -> dict[str, Any]:
    """As `resume`, where every parameter was NaN."""
    architecture, policy = _policy(mesh, config, hf_path)
    for parameter in (parameter for chunk in policy.modules for parameter in chunk.parameters()):
        parameter.data.fill_(float("nan"))
    policy.load(Path(folder))
    return _continued(mesh, architecture, policy, sequences)


def _continued(mesh: Mesh, architecture: Any, policy: Any, sequences: list) -> dict[str, Any]:
    from minpro_megatron.metrics.metric import merge
    from minpro_megatron.publishing.gather import WeightGatherer

    results = [policy.update(sequences, LEARNING_RATE) for _ in range(2)]
    losses = [merge(mesh.from_all_ranks(result.metrics))["objective/loss"].value for result in results]
    buckets = WeightGatherer(policy.modules, architecture, mesh).buckets(bucket_bytes=1 << 20)
    weights = {name: tensor.numpy().copy() for bucket in buckets for name, tensor in bucket}
    return {"losses": losses, "norms": [result.grad_norm for result in results], "weights": weights}
