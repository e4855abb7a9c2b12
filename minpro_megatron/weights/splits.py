"""How one Megatron parameter is made from Hugging Face tensors and split into tensor-parallel shards.

Along its first dimension a full parameter is a sequence of row ranges of Hugging Face tensors. A split defines that
sequence once (`blocks`), for joining, separating and streaming. `shard` returns the part of the full parameter of one
rank, and `merge` is its inverse. Nothing is computed, so round trips are bit-exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Rows `first` .. `first + count` of HF tensor number `source`; zeros if `source` is None."""

    source: int | None
    first: int
    count: int


class Split:
    """The split of one parameter. `rows` are always the first dimensions of its HF tensors, in the table's order."""

    def blocks(self, rows: Sequence[int]) -> list[list[Run]]:
        """The rows of the full parameter, in order, grouped into the blocks that Megatron shards separately."""
        raise NotImplementedError

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The shard of rank `rank` of `size` ranks."""
        raise NotImplementedError

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The full parameter from the shards of all ranks, in rank order."""
        raise NotImplementedError

    def runs(self, rows: Sequence[int]) -> list[Run]:
        """The runs of all blocks, in order."""
        return [run for block in self.blocks(rows) for run in block]

    def full_rows(self, rows: Sequence[int]) -> int:
        return sum(run.count for run in self.runs(rows))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The full parameter. Raises ValueError if the tensors' rows are not all used exactly once."""
        rows = [tensor.shape[0] for tensor in tensors]
        runs = self.runs(rows)
        used = [sum(run.count for run in runs if run.source == source) for source in range(len(tensors))]
        if used != rows:
            raise ValueError(f"tensors of {rows} rows do not make a parameter of {used} rows")
        if len(runs) == 1:
            return tensors[0]
        return torch.cat([_rows_of(tensors, run) for run in runs])

    def part(self, full: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """The HF tensors of a full parameter; a tensor whose rows are contiguous is a view of it."""
        pieces: list[list[Tensor]] = [[] for _ in rows]
        start = 0
        for run in self.runs(rows):
            if run.source is not None:
                pieces[run.source].append(full[start : start + run.count])
            start += run.count
        return [found[0] if len(found) == 1 else torch.cat(found) for found in pieces]


def _rows_of(tensors: Sequence[Tensor], run: Run) -> Tensor:
    if run.source is None:
        return tensors[0].new_zeros(run.count, *tensors[0].shape[1:])
    return tensors[run.source][run.first : run.first + run.count]


@dataclass(frozen=True)
class Replicated(Split):
    """One HF tensor, replicated on every tensor rank."""

    def blocks(self, rows: Sequence[int]) -> list[list[Run]]:
        return [[Run(0, 0, rows[0])]]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True)
class ShardedAlong(Split):
    """One HF tensor, split into equal parts along `dim` (0: output features, 1: input features)."""

    dim: int

    def blocks(self, rows: Sequence[int]) -> list[list[Run]]:
        return [[Run(0, 0, rows[0])]]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, dim=self.dim)[rank]

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), dim=self.dim)


@dataclass(frozen=True)
class Vocabulary(Split):
    """Embedding rows padded with zeros to `padded_size`, sharded along the vocabulary."""

    padded_size: int

    def blocks(self, rows: Sequence[int]) -> list[list[Run]]:
        padding = self.padded_size - rows[0]
        return [[Run(0, 0, rows[0])] + ([Run(None, 0, padding)] if padding else [])]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, dim=0)[rank]

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), dim=0)


@dataclass(frozen=True)
class GatedPair(Split):
    """Gate and up projections stacked; every rank has its part of the gate before its part of the up projection."""

    def blocks(self, rows: Sequence[int]) -> list[list[Run]]:
        return [[Run(0, 0, rows[0])], [Run(1, 0, rows[1])]]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        gate, up = full.chunk(2, dim=0)
        return torch.cat([gate.chunk(size, dim=0)[rank], up.chunk(size, dim=0)[rank]], dim=0)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        pairs = [shard.chunk(2, dim=0) for shard in shards]
        return torch.cat([gate for gate, _ in pairs] + [up for _, up in pairs], dim=0)


@dataclass(frozen=True)
class QueryGroups(Split):
    """Query, key and value projections interleaved by query group: [queries of group 0, key 0, value 0, ...]."""

    num_heads: int
    num_groups: int
    head_dim: int

    def blocks(self, rows: Sequence[int]) -> list[list[Run]]:
        counts = (self.num_heads // self.num_groups * self.head_dim, self.head_dim, self.head_dim)
        return [
            [
                Run(source, group * count, count)
                for group in range(self.num_groups)
                for source, count in enumerate(counts)
            ]
        ]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, dim=0)[rank]  # whole groups: tensor divides num_groups (checked when building)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), dim=0)
