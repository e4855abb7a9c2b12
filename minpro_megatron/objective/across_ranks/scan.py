"""Scans along a sequence's response tokens, independent of how the tokens are distributed over ranks.

An objective does not know how sequences are sharded. It calls a `PrefixScan`: `WholeSequenceScan` if one process has
whole sequences, `minpro_megatron.objective.across_ranks.sharded_scan.ShardedScan` if ranks have pieces of them.

Sums are accumulated and returned in float64: the error of a float32 sum over 20,000 log-ratios would exceed 1e-6, the
accuracy of the coefficients.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Operator = Literal["min", "sum"]
IDENTITY: dict[Operator, float] = {"min": float("inf"), "sum": 0.0}


class PrefixScan(Protocol):
    """Scans over the local slots [L] of the sequences; masked slots are ignored (they have the identity).

    Results are float64 for "sum", of the values' type for "min".
    """

    def exclusive(self, values_L: Tensor, operator: Operator) -> Tensor:
        """The reduction over the sequence's earlier unmasked slots; the identity for the first."""
        ...

    def inclusive(self, values_L: Tensor, operator: Operator) -> Tensor:
        """The reduction over the sequence's unmasked slots up to and with this one."""
        ...

    def whole(self, values_L: Tensor, operator: Operator) -> Tensor:
        """The reduction over all unmasked slots of the slot's sequence."""
        ...

    def exclusive_and_whole(self, values_L: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
        """Both results, at little more than the cost of one."""
        ...


def combined(first: Tensor, second: Tensor, operator: Operator) -> Tensor:
    return torch.minimum(first, second) if operator == "min" else first + second


def unmasked(values_L: Tensor, mask_L: Tensor, operator: Operator) -> Tensor:
    """The values with the identity in masked slots, in the dtype of the scan."""
    values = values_L.detach()
    return torch.where(mask_L, values.double() if operator == "sum" else values, IDENTITY[operator])


@dataclass(frozen=True)
class Runs:
    """Runs of adjacent slots with the same key: contiguous pieces of sequences."""

    key_L: Tensor  # int64
    column_L: Tensor  # int64: the slot's index in its run, from 0
    is_last_L: Tensor  # bool: the last slot of its run
    longest: int  # the number of slots of the longest run

    @staticmethod
    def of(key_L: Tensor, longest: int | None = None) -> "Runs":
        place = torch.arange(len(key_L), device=key_L.device)
        changes = key_L[1:] != key_L[:-1]
        is_first = torch.cat([changes.new_ones(1), changes])
        is_last = torch.cat([changes, changes.new_ones(1)])
        column = place - torch.where(is_first, place, 0).cummax(0).values
        return Runs(key_L, column, is_last, len(key_L) if longest is None else min(longest, len(key_L)))

    def running(self, values_L: Tensor, operator: Operator) -> Tensor:
        """Inclusive scan within each run, in log2(longest) passes of O(L); runs are not padded to the longest."""
        result, step = values_L.clone(), 1
        while step < self.longest:
            earlier = torch.where(self.column_L[step:] >= step, result[:-step], IDENTITY[operator])
            result[step:] = combined(earlier, result[step:], operator)
            step *= 2
        return result

    def shifted(self, running_L: Tensor, operator: Operator) -> Tensor:
        """The value of `running` one slot earlier in the run; the identity in its first slot."""
        return torch.where(self.column_L == 0, IDENTITY[operator], running_L.roll(1))

    def totals(self, running_L: Tensor, num_keys: int, operator: Operator) -> Tensor:
        """[num_keys] reduction of each key's run, the identity for keys that have none."""
        # all other slots write to one extra element, which is dropped: runs are not counted on the host
        place = torch.where(self.is_last_L, self.key_L, num_keys)
        totals = running_L.new_full((num_keys + 1,), IDENTITY[operator])
        return totals.scatter_(0, place, running_L)[:num_keys]


class WholeSequenceScan:
    """Scans over local slots that contain whole sequences, one after another.

    >>> scan = WholeSequenceScan(torch.tensor([0, 0, 0]), torch.tensor([1.0, 0.0, 1.0]))
    >>> scan.exclusive(torch.tensor([3.0, -9.0, 5.0]), "min").tolist()
    [inf, 3.0, 3.0]
    """

    def __init__(self, sequence_L: Tensor, mask_L: Tensor) -> None:
        """A sequence is a run of equal adjacent values in `sequence_L`."""
        self._mask_L = mask_L.bool()
        names, sequence_L = torch.unique_consecutive(sequence_L, return_inverse=True)
        self._num_sequences = len(names)
        self._runs = Runs.of(sequence_L)

    def exclusive(self, values_L: Tensor, operator: Operator) -> Tensor:
        return self._runs.shifted(self.inclusive(values_L, operator), operator)

    def inclusive(self, values_L: Tensor, operator: Operator) -> Tensor:
        return self._runs.running(unmasked(values_L, self._mask_L, operator), operator)

    def whole(self, values_L: Tensor, operator: Operator) -> Tensor:
        return self.exclusive_and_whole(values_L, operator)[1]

    def exclusive_and_whole(self, values_L: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
        running = self.inclusive(values_L, operator)
        totals = self._runs.totals(running, self._num_sequences, operator)
        return self._runs.shifted(running, operator), totals[self._runs.key_L]
