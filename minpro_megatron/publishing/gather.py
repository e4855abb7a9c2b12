"""Gathers the whole model on rank 0, one bucket at a time, from the shards of all ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.models.architecture import Architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.local import axis_rank_and_size, global_parameters
from minpro_megatron.weights.splits import Replicated
from minpro_megatron.weights.table import Entry, entries


@dataclass(frozen=True)
class _Held:
    """One entry's shard on a rank: its index on the entry's axis, and its shape."""

    piece: int
    shape: tuple[int, ...]


class WeightGatherer:
    """Gathers parameters on rank 0. The constructor decides once which rank sends which shard (collective)."""

    def __init__(self, chunks: Sequence[torch.nn.Module], architecture: Architecture, mesh: Mesh) -> None:
        self._mesh = mesh
        self._parameters = global_parameters(chunks, architecture.num_experts, mesh)
        self._entries = entries(architecture)
        model: Any = chunks[0]
        self._dtype: torch.dtype = model.config.params_dtype
        announced = mesh.from_all_ranks(self._held_here())
        # for every entry: shard index -> the lowest rank that has it
        self._senders: dict[str, dict[int, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for rank, held in enumerate(announced):
            for name, shard in held.items():
                self._senders.setdefault(name, {}).setdefault(shard.piece, rank)
                self._shapes[name] = shard.shape
        absent = [entry.megatron for entry in self._entries if entry.megatron not in self._senders]
        assert not absent, f"no rank has {absent[:3]}"

    def buckets(self, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """HF names and tensors on rank 0, in buckets of at most `bucket_bytes`; empty lists elsewhere. Collective.
        A parameter larger than `bucket_bytes` is a bucket of its own."""
        first = next(iter(self._parameters.values()))
        assert first.untyped_storage().nbytes(), "the weights are in host memory"
        for bucket in self._plan(bucket_bytes):
            yield self._collect(bucket)

    def num_buckets(self, bucket_bytes: int) -> int:
        """The number of buckets that `buckets` yields."""
        return len(self._plan(bucket_bytes))

    def _held_here(self) -> dict[str, _Held]:
        held = {}
        for entry in self._entries:
            parameter = self._parameters.get(entry.megatron)
            if parameter is not None:
                piece = 0 if isinstance(entry.split, Replicated) else axis_rank_and_size(entry, self._mesh)[0]
                held[entry.megatron] = _Held(piece, tuple(parameter.shape))
        return held

    def _plan(self, bucket_bytes: int) -> list[list[Entry]]:
        sizes = [
            _numel(self._shapes[entry.megatron])
            * len(self._senders[entry.megatron])
            * entry.dtype(self._dtype).itemsize
            for entry in self._entries
        ]
        return [self._entries[bucket] for bucket in consecutive_buckets(sizes, bucket_bytes)]

    def _collect(self, bucket: Sequence[Entry]) -> list[tuple[str, Tensor]]:
        """Each sender sends its shards of the bucket as one flat tensor of each dtype; rank 0 merges them."""
        with torch.no_grad():
            if self._mesh.rank != 0:
                for pieces in self._pieces_of(self._mesh.rank, bucket).values():
                    dist.send(torch.cat([self._parameters[name].detach().flatten() for name, _ in pieces]), dst=0)
                return []
            shards: dict[tuple[str, int], Tensor] = {}
            for rank in sorted({rank for entry in bucket for rank in self._senders[entry.megatron].values()}):
                shards.update(self._receive(rank, bucket))
            return [pair for entry in bucket for pair in self._merge(entry, shards)]

    def _pieces_of(self, rank: int, bucket: Sequence[Entry]) -> dict[torch.dtype, list[tuple[str, int]]]:
        """(name, shard index) of the shards that the rank sends, by their dtype."""
        found: dict[torch.dtype, list[tuple[str, int]]] = {}
        for entry in bucket:
            for piece, sender in self._senders[entry.megatron].items():
                if sender == rank:
                    found.setdefault(entry.dtype(self._dtype), []).append((entry.megatron, piece))
        return found

    def _receive(self, rank: int, bucket: Sequence[Entry]) -> dict[tuple[str, int], Tensor]:
        shards: dict[tuple[str, int], Tensor] = {}
        for dtype, pieces in self._pieces_of(rank, bucket).items():
            if rank == 0:
                shards |= {(name, piece): self._parameters[name].detach() for name, piece in pieces}
                continue
            sizes = [_numel(self._shapes[name]) for name, _ in pieces]
            flat = torch.empty(sum(sizes), dtype=dtype, device=self._mesh.device)
            dist.recv(flat, src=rank)
            shards |= {
                key: part.view(self._shapes[key[0]]) for key, part in zip(pieces, flat.split(sizes), strict=True)
            }
        return shards

    def _merge(self, entry: Entry, shards: dict[tuple[str, int], Tensor]) -> list[tuple[str, Tensor]]:
        pieces = sorted(self._senders[entry.megatron])
        if len(pieces) == 1:
            full = shards[entry.megatron, pieces[0]]
        else:
            full = entry.split.merge([shards[entry.megatron, piece] for piece in pieces])
        return list(zip(entry.hf, entry.part(full), strict=True))


def consecutive_buckets(sizes: Sequence[int], bucket_bytes: int) -> list[slice]:
    """Slices of `sizes`, in order, that each add up to at most `bucket_bytes` or hold a single larger size."""
    slices, first, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > bucket_bytes:
            slices.append(slice(first, index))
            first, total = index, 0
        total += size
    return [*slices, slice(first, len(sizes))]


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
