"""Assigns sequences to packed rows, and rows to data-parallel ranks."""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from minpro_megatron.errors import UserError


@dataclass(frozen=True)
class SequenceCost:
    """The computation for a sequence of n tokens, linear * n + quadratic * n^2, in any unit. Because of attention one
    long sequence costs more than two sequences of half its length."""

    linear: float
    quadratic: float

    def of(self, num_tokens: int) -> float:
        return self.linear * num_tokens + self.quadratic * num_tokens**2


def pack_rows(lengths: Sequence[int], costs: Sequence[float], max_tokens: int, multiple: int) -> list[list[int]]:
    """Sequence indices of each row: at most `max_tokens` per row, and a number of rows that is a multiple of
    `multiple`.

    The sequences are placed in descending order of cost, each into the cheapest row that still has room, with the
    smallest number of rows for which that works: the rows have similar costs, so no rank waits long for another.
    Deterministic; inside a row indices ascend. A row is empty only if there are fewer sequences than rows. Raises
    ValueError for a sequence longer than a row.

    >>> pack_rows([5, 1, 3, 4], [5, 1, 3, 4], max_tokens=8, multiple=2)
    [[0, 1], [2, 3]]
    """
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise UserError(
                f"sequence {index} has {length} tokens with padding, more than batch.max_tokens_per_row = "
                f"{max_tokens}; raise it or shorten the responses"
            )
    dearest_first = sorted(range(len(lengths)), key=lambda index: (-costs[index], index))
    num_rows = -(-max(1, -(-sum(lengths) // max_tokens)) // multiple) * multiple
    while True:
        rows = _fill(dearest_first, lengths, costs, max_tokens, num_rows)
        if rows is not None:
            return rows
        num_rows += multiple


def _fill(
    dearest_first: list[int], lengths: Sequence[int], costs: Sequence[float], max_tokens: int, num_rows: int
) -> list[list[int]] | None:
    """The rows, or None if a sequence finds no room.

    A row without room for a sequence is set aside until a sequence comes that is short enough for it. The sequences
    become shorter, so a row is set aside at most once for each sequence that it receives: the time is proportional to
    n log n.
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    tokens = [0] * num_rows
    by_cost = [(0.0, row) for row in range(num_rows)]  # a heap of the rows that may have room
    aside: list[tuple[int, float, int]] = []  # a heap of the others: (tokens, cost, row)
    left = sum(lengths)
    room = num_rows * max_tokens  # of all rows but those that no remaining sequence fits into
    shortest = _shortest_of_rest(dearest_first, lengths)
    for place, index in enumerate(dearest_first):
        length = lengths[index]
        while aside and aside[0][0] + length <= max_tokens:
            _, spent, row = heapq.heappop(aside)
            heapq.heappush(by_cost, (spent, row))
        while by_cost and tokens[by_cost[0][1]] + length > max_tokens:
            spent, row = heapq.heappop(by_cost)
            if tokens[row] + shortest[place] > max_tokens:
                room -= max_tokens - tokens[row]
            else:
                heapq.heappush(aside, (tokens[row], spent, row))
        if not by_cost or room < left:
            return None
        spent, row = by_cost[0]
        rows[row].append(index)
        tokens[row] += length
        room -= length
        left -= length
        heapq.heapreplace(by_cost, (spent + costs[index], row))
    return [sorted(row) for row in rows]


def _shortest_of_rest(order: list[int], lengths: Sequence[int]) -> list[int]:
    """For each place in `order`, the smallest length from there to the end."""
    found = list(itertools.accumulate((lengths[index] for index in reversed(order)), min))
    return found[::-1]


def share_rows(row_costs: Sequence[float], data_size: int) -> list[list[int]]:
    """The rows of each data-parallel rank, the same number for each, in the order in which the rank processes them.

    Rows of similar cost are processed at the same time on all ranks, because with expert parallelism the ranks wait for
    each other in every layer. Of the rows of one time, the most expensive goes to the rank with the least work so far.

    >>> share_rows([1.0, 4.0, 2.0, 3.0], data_size=2)
    [[1, 0], [3, 2]]
    """
    assert len(row_costs) % data_size == 0, f"{len(row_costs)} rows cannot be divided among {data_size} ranks"
    dearest_first = sorted(range(len(row_costs)), key=lambda row: (-row_costs[row], row))
    shares: list[list[int]] = [[] for _ in range(data_size)]
    spent = [0.0] * data_size
    for first in range(0, len(dearest_first), data_size):
        least_first = sorted(range(data_size), key=lambda rank: (spent[rank], rank))
        for rank, row in zip(least_first, dearest_first[first : first + data_size], strict=True):
            shares[rank].append(row)
            spent[rank] += row_costs[row]
    return shares


def imbalance(row_costs: Sequence[float], shares: Sequence[Sequence[int]]) -> float:
    """How much longer the busiest rank works than the mean: 0 for equal shares, 0.1 for 10 % more."""
    spent = [sum(row_costs[row] for row in share) for share in shares]
    mean = sum(spent) / len(spent)
    return max(spent) / mean - 1 if mean else 0.0
