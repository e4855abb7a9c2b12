"""How one Megatron parameter is made from Hugging Face tensors, and cut into tensor-parallel shards.

Every split is four exact rearrangements: `join` (HF tensors -> full parameter) and its inverse `part`; `shard` (full
parameter -> the piece of one rank) and its inverse `merge`. Nothing is computed, so round trips are bit-exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Split(Protocol):
    def join(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def part(self, full: Tensor) -> list[Tensor]: ...

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor: ...

    def merge(self, shards: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Whole:
    """One HF tensor, replicated on every tensor rank."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def part(self, full: Tensor) -> list[Tensor]:
        return [full]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True)
class Along:
    """One HF tensor, cut into equal pieces along `dim` (0: output features, 1: input features)."""

    dim: int

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def part(self, full: Tensor) -> list[Tensor]:
        return [full]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, dim=self.dim)[rank]

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), dim=self.dim)


@dataclass(frozen=True)
class Vocabulary:
    """Embedding rows padded with zeros from `vocab_size` to `padded_size`, cut along the vocabulary."""

    vocab_size: int
    padded_size: int

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        if tensors[0].shape[0] != self.vocab_size:
            raise ValueError(
                f"config.json says vocab_size = {self.vocab_size}, the embedding has {tensors[0].shape[0]} rows"
            )
        full = tensors[0].new_zeros(self.padded_size, tensors[0].shape[1])
        full[: self.vocab_size] = tensors[0]
        return full

    def part(self, full: Tensor) -> list[Tensor]:
        return [full[: self.vocab_size]]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, dim=0)[rank]

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), dim=0)


@dataclass(frozen=True)
class GatedPair:
    """Gate and up projections stacked; every rank holds its part of the gate above its part of the up projection."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=0)

    def part(self, full: Tensor) -> list[Tensor]:
        return list(full.chunk(2, dim=0))

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        gate, up = full.chunk(2, dim=0)
        return torch.cat([gate.chunk(size, dim=0)[rank], up.chunk(size, dim=0)[rank]], dim=0)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        pairs = [shard.chunk(2, dim=0) for shard in shards]
        return torch.cat([gate for gate, _ in pairs] + [up for _, up in pairs], dim=0)


@dataclass(frozen=True)
class QueryGroups:
    """Query, key and value projections interleaved by query group: [queries of group 0, key 0, value 0, ...]."""

    num_heads: int
    num_groups: int
    head_dim: int

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        query, key, value = tensors
        hidden = query.shape[1]
        per_group = self.num_heads // self.num_groups * self.head_dim
        rows = [
            query.reshape(self.num_groups, per_group, hidden),
            key.reshape(self.num_groups, self.head_dim, hidden),
            value.reshape(self.num_groups, self.head_dim, hidden),
        ]
        return torch.cat(rows, dim=1).reshape(-1, hidden)

    def part(self, full: Tensor) -> list[Tensor]:
        hidden = full.shape[1]
        per_group = self.num_heads // self.num_groups * self.head_dim
        sizes = [per_group, self.head_dim, self.head_dim]
        pieces = full.reshape(self.num_groups, sum(sizes), hidden).split(sizes, dim=1)
        return [piece.reshape(-1, hidden) for piece in pieces]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, dim=0)[rank]  # whole groups: tensor divides num_groups (checked when building)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), dim=0)
