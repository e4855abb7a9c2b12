"""The rank's part in publishing weights, with the real gatherer and the real buffers of the broadcast."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.publishing import gather
from minpro_megatron.publishing.broadcast import Broadcaster


def gather_and_flatten(config: RunConfig, chunks: Sequence[GPTModel], architecture: Architecture, mesh: Mesh) -> None:
    """Gathers all buckets; on rank 0 also copies each into a buffer of the broadcast. Without pipeline stages: what the
    other ranks hold is worked out from their places on the mesh."""
    kind: Any = type(mesh)
    from_all_ranks = kind.from_all_ranks
    kind.from_all_ranks = lambda self, value: _held_by_all(config, chunks, architecture)
    try:
        gatherer = gather.WeightGatherer(chunks, architecture, mesh)
    finally:
        kind.from_all_ranks = from_all_ranks
    broadcaster = Broadcaster(mesh.device, config.publish.timeout_s)
    for bucket in gatherer.buckets(config.publish.bucket_bytes):
        if bucket:
            broadcaster._flatten([tensor for _, tensor in bucket])
        del bucket
    broadcaster.finish()


def _held_by_all(config: RunConfig, chunks: Sequence[torch.nn.Module], architecture: Architecture) -> list[Any]:
    """What each rank announces to the gatherer: its shards, by the names of the whole parameters."""
    parallel, held = config.parallel, []
    for rank in range(parallel.world_size):
        mesh: Any = SimpleNamespace(
            config=parallel,
            tensor=_place(rank % parallel.tensor, parallel.tensor),
            expert=_place(rank // parallel.expert_tensor % parallel.expert, parallel.expert),
            expert_tensor=_place(rank % parallel.expert_tensor, parallel.expert_tensor),
            from_all_ranks=lambda value: [value],
        )
        other = object.__new__(gather.WeightGatherer)
        other._mesh, other._entries = mesh, gather.entries(architecture)
        other._parameters = gather.global_parameters(chunks, architecture.num_experts, mesh)
        held.append(other._held_here())
    return held


def _place(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)
