"""The rank's part in publishing weights, with the real gatherer and the real buffers of a bucket."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.publishing import gather
from minpro_megatron.publishing.broadcast import bucket_memory
from minpro_megatron.publishing.sender import BucketMemory
from minpro_megatron.weights.splits import Replicated
from minpro_megatron.weights.table import Entry, entries


def gather_and_flatten(
    config: RunConfig, chunks: Sequence[GPTModel], architecture: Architecture, mesh: Mesh
) -> BucketMemory:
    """Gathers all buckets; on rank 0 also copies each into a buffer of the transport. What the other ranks announce is
    worked out from their places on the mesh; an AssertionError if that differs for this rank from what it holds.
    Returns the buffers, which a sender through shared memory keeps."""

    def announced(self: Any, own: Any) -> list[Any]:
        found = held_by_all(config.parallel, architecture)
        assert found[mesh.rank] == own, "the shards that this rank holds are not those of its place on the mesh"
        return found

    kind: Any = type(mesh)
    from_all_ranks, kind.from_all_ranks = kind.from_all_ranks, announced
    try:
        gatherer = gather.WeightGatherer(chunks, architecture, mesh)
    finally:
        kind.from_all_ranks = from_all_ranks
    on_host = config.publish.transport == "shared_memory"
    memory = BucketMemory(host_bytes) if on_host else bucket_memory()
    for bucket in gatherer.buckets(config.publish.bucket_bytes):
        if bucket:
            memory.fill([tensor for _, tensor in bucket])
        del bucket
    return memory


def host_bytes(num_bytes: int, _: torch.device) -> torch.Tensor:
    """In place of shared memory: tensors without content have none."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def held_by_all(parallel: ParallelConfig, architecture: Architecture) -> list[dict[str, gather._Held]]:
    """What each rank announces to the gatherer: its shards, by the names of the whole parameters."""
    found, shard_shape = entries(architecture), _cached_shard_shape()
    stages = _stages(parallel, architecture.num_layers)
    per_rank = architecture.num_experts // parallel.expert
    return [_held_by(rank, parallel, per_rank, found, stages, shard_shape) for rank in range(parallel.world_size)]


def _cached_shard_shape() -> Callable[[Entry, int], tuple[int, ...]]:
    """Entry.shard_shape, computed once for all layers and experts with equal shapes: each takes a millisecond."""
    known: dict[tuple, tuple[int, ...]] = {}

    def shard_shape(entry: Entry, size: int) -> tuple[int, ...]:
        key = (entry.shapes, entry.split, size)
        if key not in known:
            known[key] = entry.shard_shape(size)
        return known[key]

    return shard_shape


def _held_by(
    rank: int,
    parallel: ParallelConfig,
    experts: int,
    found: Sequence[Entry],
    stages: Sequence[int],
    shard_shape: Callable[[Entry, int], tuple[int, ...]],
) -> dict[str, gather._Held]:
    """`experts`: of each rank. `stages`: of each layer."""
    expert = rank // parallel.expert_tensor % parallel.expert
    stage = rank // (parallel.world_size // parallel.pipeline)
    mesh: Any = SimpleNamespace(
        tensor=_place(rank % parallel.tensor, parallel.tensor),
        expert_tensor=_place(rank % parallel.expert_tensor, parallel.expert_tensor),
    )
    held = {}
    for entry in found:
        first = 0 if entry.megatron.startswith("embedding.") else parallel.pipeline - 1
        if stage != (first if entry.layer is None else stages[entry.layer]):
            continue
        if entry.expert is not None and entry.expert // experts != expert:
            continue
        piece, size = (0, 1) if isinstance(entry.split, Replicated) else gather.axis_rank_and_size(entry, mesh)
        held[entry.megatron] = gather._Held(piece, shard_shape(entry, size))
    return held


def _stages(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """The pipeline stage of each layer."""
    sizes = parallel.chunk_layers(num_layers)
    return [chunk % parallel.pipeline for chunk, size in enumerate(sizes) for _ in range(size)]


def _place(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)
