"""Exact order statistics of values that are distributed over ranks. The ranks exchange a few thousand counts, never the
values.

The 64 bits of a value are examined eight at a time, the highest first. In each of the eight rounds every rank counts
its values in 256 buckets, the counts are summed over the ranks, and the next round searches the bucket that contains
the requested position. The result does not depend on how the values are distributed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_SIGN = torch.iinfo(torch.int64).min
_REST = torch.iinfo(torch.int64).max


class Ranks(Protocol):
    """Collectives over the ranks that share the tokens of a mini-batch; all ranks call them in the same order."""

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over the ranks."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """The elementwise maximum over the ranks."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """The concatenation of all ranks' `values` [any length], in rank order."""
        ...


class OneRank:
    """`Ranks` of a single process."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class Boundary:
    """The point in the sorted values from which a condition is false."""

    value: float  # the smallest value for which it is false
    count_below: int  # values strictly below
    total_below: float  # their sum


def boundary(values_N: Tensor, holds: Callable[[Tensor, Tensor, Tensor], Tensor], ranks: Ranks) -> Boundary | None:
    """The smallest value x for which `holds(count, total, x)` is false; None if it is true for all values.

    `holds` takes float64 tensors: the number and the sum of all values <= x, and x. It must be true up to some x and
    false from there on. x need not be one of the values. Values must be finite; computed in float64.
    """
    values_N = values_N.double()
    keys_N = _ordered_bits(values_N)
    prefix, below = 0, values_N.new_zeros(2)
    numbers = torch.stack([torch.ones_like(values_N), values_N], dim=1)
    largest = ranks.max(values_N.amax() if len(values_N) else values_N.new_full((), -torch.inf))
    count_and_total = ranks.sum(numbers.sum(0))
    if count_and_total[0] == 0 or holds(count_and_total[:1], count_and_total[1:], largest[None])[0]:
        return None
    for shift in range(56, -1, -8):
        # the prefix's higher bits must agree; in the first round there are none (a shift by 64 is not defined)
        agree = (keys_N ^ prefix) >> (shift + 8) == 0 if shift < 56 else torch.ones_like(keys_N, dtype=torch.bool)
        digit = (keys_N >> shift) & 255
        buckets = numbers.new_zeros(257, 2).index_add_(0, torch.where(agree, digit, 256), numbers)[:256]
        running = below + ranks.sum(buckets).cumsum(0)
        edges = _from_ordered_bits(prefix + (torch.arange(256, device=keys_N.device) << shift) + ((1 << shift) - 1))
        fits = holds(running[:, 0], running[:, 1], edges)
        # by rounding, the condition may be true for the last bucket of a later round but false for its parent bucket
        first = min(int((~fits).int().argmax()) if not bool(fits.all()) else 255, 255)
        below = running[first - 1] if first else below
        prefix = _signed(prefix + (first << shift))
    value = float(_from_ordered_bits(torch.tensor(prefix)))
    return Boundary(value, int(below[0]), float(below[1]))


def order_statistic(values_N: Tensor, place: int, ranks: Ranks) -> float:
    """The value at index `place` (from 0) of all ranks' values in ascending order; NaN sorts beyond the infinity of its
    sign.

    Raises ValueError if there is no such index.
    """
    found = boundary(values_N, lambda count, total, edge: count <= place, ranks)
    if place < 0 or found is None:
        raise ValueError(f"place = {place}: there are not that many values")
    return found.value


def quantile(values_N: Tensor, share: float, ranks: Ranks) -> float:
    """The `share` quantile over all ranks with linear interpolation, as in numpy.quantile; NaN without values."""
    count = int(ranks.sum(torch.tensor(len(values_N), device=values_N.device)))
    if count == 0:
        return float("nan")
    place = share * (count - 1)
    lower = order_statistic(values_N, int(place), ranks)
    fraction = place - int(place)
    if fraction == 0:
        return lower
    upper = order_statistic(values_N, int(place) + 1, ranks)
    # from the nearer end, as numpy does: rounding cannot move the result beyond the other end
    return lower + fraction * (upper - lower) if fraction < 0.5 else upper - (1 - fraction) * (upper - lower)


def smallest(values_N: Tensor, ids_N: Tensor, how_many: int, ranks: Ranks) -> Tensor:
    """bool [N]: the local values that are among the `how_many` smallest of all ranks. Of equal values, those with the
    smaller id are chosen first."""
    if how_many <= 0:
        return torch.zeros_like(ids_N, dtype=torch.bool)
    edge = boundary(values_N, lambda count, total, edge: count < how_many, ranks)
    if edge is None:
        return torch.ones_like(ids_N, dtype=torch.bool)
    tied = values_N.double() == edge.value
    last_id = order_statistic(ids_N[tied], how_many - edge.count_below - 1, ranks)
    return (values_N.double() < edge.value) | (tied & (ids_N <= last_id))


def _ordered_bits(values: Tensor) -> Tensor:
    """int64 whose unsigned order is the order of the float64 `values`."""
    bits = (values + 0.0).view(torch.int64)  # + 0.0: -0.0 and 0.0 are equal
    return torch.where(bits < 0, ~bits, bits ^ _SIGN)


def _from_ordered_bits(keys: Tensor) -> Tensor:
    bits = torch.where(keys < 0, keys ^ _SIGN, ~keys)
    return bits.view(torch.float64)


def _signed(key: int) -> int:
    return key - (1 << 64) if key > _REST else key
