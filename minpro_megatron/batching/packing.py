"""Assigns sequences to packed rows, and rows to data-parallel ranks."""

import heapq
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
    `multiple`, the number of ranks that share the rows.

    The sequences are placed in descending order of cost, each into the rank that has the least to compute so far, and
    there into the cheapest row, among the ranks and rows that still have room for it; with the smallest number of rows
    for which that works. So the ranks' sums are similar, and the rows of a rank, too, as far as single sequences allow.
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
        rows = _fill(dearest_first, lengths, costs, max_tokens, num_rows, multiple)
        if rows is not None:
            return rows
        num_rows += multiple


class _Cheapest:
    """Members with costs, and with tokens that limit what they still have room for.

    A member without room for a sequence is set aside until a sequence comes that is short enough for it. Sequences
    become shorter, so a member is set aside about once for each sequence that it receives: placing n sequences takes
    time proportional to n log n.
    """

    def __init__(self, count: int) -> None:
        self.tokens = [0] * count
        self._by_cost = [(0.0, member) for member in range(count)]  # a heap of those that may have room
        self._aside: list[tuple[int, float, int]] = []  # a heap of the others: (tokens, cost, member)

    def with_room(self, most_tokens: int) -> int | None:
        """The cheapest member with at most `most_tokens` tokens."""
        by_cost, aside = self._by_cost, self._aside
        while aside and aside[0][0] <= most_tokens:
            _, cost, member = heapq.heappop(aside)
            heapq.heappush(by_cost, (cost, member))
        while by_cost and self.tokens[by_cost[0][1]] > most_tokens:
            cost, member = heapq.heappop(by_cost)
            heapq.heappush(aside, (self.tokens[member], cost, member))
        return by_cost[0][1] if by_cost else None

    def add(self, cost: float, tokens: int) -> None:
        """Adds `cost` to the member that `with_room` has just returned, which has `tokens` tokens now."""
        before, member = self._by_cost[0]
        self.tokens[member] = tokens
        heapq.heapreplace(self._by_cost, (before + cost, member))


class _Rank:
    """The rows of one rank, and the number of tokens of its emptiest row."""

    def __init__(self, num_rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self._choice = _Cheapest(num_rows)
        self._by_tokens = [(0, row) for row in range(num_rows)]  # a heap with outdated entries

    def place(self, index: int, length: int, cost: float, max_tokens: int) -> int:
        """Puts a sequence into the cheapest row with room; returns the tokens of the emptiest row then."""
        row = self._choice.with_room(max_tokens - length)
        assert row is not None, "the emptiest row has room"
        self.rows[row].append(index)
        tokens = self._choice.tokens
        self._choice.add(cost, tokens[row] + length)
        heapq.heappush(self._by_tokens, (tokens[row], row))
        while self._by_tokens[0][0] != tokens[self._by_tokens[0][1]]:
            heapq.heappop(self._by_tokens)
        return self._by_tokens[0][0]


def _fill(
    dearest_first: list[int],
    lengths: Sequence[int],
    costs: Sequence[float],
    max_tokens: int,
    num_rows: int,
    num_ranks: int,
) -> list[list[int]] | None:
    """The rows, or None if a sequence finds no room."""
    ranks = [_Rank(num_rows // num_ranks) for _ in range(num_ranks)]
    choice = _Cheapest(num_ranks)  # by the tokens of a rank's emptiest row
    for index in dearest_first:
        length = lengths[index]
        rank = choice.with_room(max_tokens - length)
        if rank is None:
            return None
        choice.add(costs[index], ranks[rank].place(index, length, costs[index], max_tokens))
    return [sorted(row) for rank in ranks for row in rank.rows]


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
