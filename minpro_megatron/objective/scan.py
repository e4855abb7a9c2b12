"""Scans along a sequence's response tokens: what an objective asks for, whoever holds which tokens.

An objective never knows how sequences are cut. It asks a `PrefixScan`; `WholeSequenceScan` answers where one
process holds whole sequences, `minpro_megatron.parallel.prefix_scan.ShardedScan` where ranks hold pieces of them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IDENTITY = {"min": float("inf"), "sum": 0.0}


class PrefixScan(Protocol):
    """Scans over the local slots [L] of the sequences; masked slots are transparent (they hold the identity)."""

    def exclusive(self, values_L: Tensor, operator: str) -> Tensor:
        """The reduction ("min" or "sum") over the sequence's earlier unmasked slots; the identity for the first."""
        ...

    def whole(self, values_L: Tensor, operator: str) -> Tensor:
        """The reduction over all unmasked slots of the slot's sequence."""
        ...


def running(values: Tensor, operator: str, dim: int) -> Tensor:
    """Inclusive running minimum or sum along `dim`."""
    return values.cummin(dim).values if operator == "min" else values.cumsum(dim)


def reduced(values: Tensor, operator: str, dim: int) -> Tensor:
    return values.amin(dim) if operator == "min" else values.sum(dim)


def exclusive_of(values: Tensor, operator: str, dim: int) -> Tensor:
    """Exclusive running minimum or sum along `dim`: shifted by one, the identity first."""
    first = torch.full_like(values.narrow(dim, 0, 1), IDENTITY[operator])
    return torch.cat([first, running(values, operator, dim).narrow(dim, 0, values.shape[dim] - 1)], dim)


@dataclass(frozen=True)
class PieceBlock:
    """Contiguous runs of slots ("pieces") laid out as rows of one [pieces, width] block."""

    index: Tensor  # int64 [pieces, width]: the slot, clamped to a valid one in the padding
    valid: Tensor  # bool [pieces, width]
    piece_L: Tensor  # int64 [L]: the slot's piece
    column_L: Tensor  # int64 [L]: the slot's place in its piece

    @staticmethod
    def of_runs(key_L: Tensor) -> "PieceBlock":
        """A piece for each run of equal neighbours in `key_L`."""
        _, piece_L, counts = torch.unique_consecutive(key_L, return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        column_L = torch.arange(len(key_L), device=key_L.device) - starts[piece_L]
        columns = torch.arange(int(counts.max()), device=key_L.device)
        valid = columns[None, :] < counts[:, None]
        index = (starts[:, None] + columns[None, :]).clamp_(max=len(key_L) - 1)
        return PieceBlock(index, valid, piece_L, column_L)

    def lay_out(self, values_L: Tensor, identity: float) -> Tensor:
        return torch.where(self.valid, values_L[self.index], identity)

    def pick(self, block: Tensor) -> Tensor:
        return block[self.piece_L, self.column_L]


class WholeSequenceScan:
    """Scans where every sequence lies whole in the local slots, one after another.

    >>> scan = WholeSequenceScan(torch.tensor([0, 0, 0]), torch.tensor([1.0, 0.0, 1.0]))
    >>> scan.exclusive(torch.tensor([3.0, -9.0, 5.0]), "min").tolist()
    [inf, 3.0, 3.0]
    """

    def __init__(self, sequence_L: Tensor, mask_L: Tensor) -> None:
        self._mask_L = mask_L.bool()
        self._block = PieceBlock.of_runs(sequence_L)

    def exclusive(self, values_L: Tensor, operator: str) -> Tensor:
        return self._block.pick(exclusive_of(self._unmasked(values_L, operator), operator, dim=1))

    def whole(self, values_L: Tensor, operator: str) -> Tensor:
        return reduced(self._unmasked(values_L, operator), operator, dim=1)[self._block.piece_L]

    def _unmasked(self, values_L: Tensor, operator: str) -> Tensor:
        identity = IDENTITY[operator]
        return self._block.lay_out(torch.where(self._mask_L, values_L, identity), identity)
