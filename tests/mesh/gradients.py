"""Whole gradient tensors under Hugging Face names, out of megatron's sharded gradient buffers."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.actor.policy import Policy
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.publishing.gather import WeightGatherer
from minpro_megatron.weights.local import axis_rank_and_size, global_parameters
from minpro_megatron.weights.splits import Replicated
from minpro_megatron.weights.table import entries


@torch.no_grad()
def whole_gradients(policy: Policy, architecture: Architecture, mesh: Mesh) -> dict[str, np.ndarray]:
    """The gradients of the policy's last update, after clipping, on rank 0 (nothing on other ranks). Collective.

    The weights stand aside while the gradients travel as weights do. Raises AssertionError where ranks that hold the
    same parameter disagree on its gradient.
    """
    _complete_shards(policy)
    parameters: list[Any] = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.copy_(parameter.main_grad) if parameter.requires_grad else parameter.zero_()
    try:
        return whole_tensors(policy, architecture, mesh)
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)


def whole_tensors(policy: Policy, architecture: Architecture, mesh: Mesh) -> dict[str, np.ndarray]:
    """The model's parameters on rank 0 (nothing on other ranks), after a look at whether the replicas agree."""
    _compare_replicas(policy, architecture, mesh)
    buckets = WeightGatherer(policy.modules, architecture, mesh).buckets(bucket_bytes=1 << 20)
    # numpy: a tensor sent through a queue lives only as long as the process that made it
    return {name: tensor.numpy().copy() for bucket in buckets for name, tensor in bucket}


def _complete_shards(policy: Policy) -> None:
    """After megatron's reduce-scatter each data x context rank has the right values in its own shard only."""
    for chunk in policy._chunks:
        for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = bucket_group.intra_distributed_optimizer_instance_group
            for bucket in bucket_group.buckets:
                own: Tensor = bucket.grad_data.view(ranks.size(), -1)[ranks.rank()].clone()
                dist.all_gather_single(bucket.grad_data, own, group=ranks)


def _compare_replicas(policy: Policy, architecture: Architecture, mesh: Mesh) -> None:
    first_holder: dict[tuple[str, int], tuple[int, str]] = {}
    for rank, held in enumerate(mesh.from_all_ranks(dict(_digests(policy, architecture, mesh)))):
        for piece, digest in held.items():
            other, expected = first_holder.setdefault(piece, (rank, digest))
            assert digest == expected, f"ranks {other} and {rank} hold different {piece[0]}"


def _digests(policy: Policy, architecture: Architecture, mesh: Mesh) -> Iterator[tuple[tuple[str, int], str]]:
    parameters = global_parameters(policy.modules, architecture.num_experts, mesh)
    for entry in entries(architecture):
        names = [entry.megatron]
        if architecture.tied_embeddings and entry.megatron.startswith("embedding."):
            names.append("output_layer.weight")  # the last stage's own copy
        piece = 0 if isinstance(entry.split, Replicated) else axis_rank_and_size(entry, mesh)[0]
        for name in names:
            if name in parameters:
                data = parameters[name].detach().cpu().contiguous()
                yield (entry.megatron, piece), hashlib.sha256(data.numpy().tobytes()).hexdigest()
