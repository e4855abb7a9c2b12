"""Packing loses no sequence, overfills no row and gives every rank as many rows."""

import itertools
import time
from collections.abc import Iterable

import numpy as np
import pytest

from minpro_megatron.batching.packing import SequenceCost, imbalance, pack_rows, share_rows

COST = SequenceCost(linear=1.0, quadratic=1 / 16_000)  # about Qwen3-30B-A3B: attention doubles the cost at 16k tokens


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_row_within_capacity(seed: int, multiple: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 101, random.integers(1, 60)).tolist()
    rows = pack_rows(lengths, lengths, 100, multiple)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 100 for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert len(rows) % multiple == 0
    assert rows == pack_rows(list(lengths), list(lengths), 100, multiple)


def test_no_row_is_empty_while_there_are_as_many_sequences() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        lengths = random.integers(1, 101, random.integers(8, 60)).tolist()
        rows = pack_rows(lengths, lengths, 100, 4)
        assert len(lengths) < len(rows) or all(rows)


def test_rows_come_out_alike() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, 400).tolist()
    filled = [sum(lengths[index] for index in row) for row in pack_rows(lengths, lengths, 1000, 4)]
    assert max(filled) - min(filled) <= 30
    assert len(filled) == 24  # 20,000 tokens; the fewest rows in fours that hold them


def test_the_fewest_rows_are_taken() -> None:
    assert len(pack_rows([50, 50, 50, 50], [50, 50, 50, 50], 100, 1)) == 2
    assert len(pack_rows([60, 60, 60, 40], [60, 60, 60, 40], 100, 1)) == 3
    assert pack_rows([3], [3], 100, 4) == [[0], [], [], []]
    assert len(pack_rows([100] * 6, [100] * 6, 100, 4)) == 8


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 101 tokens.*batch.max_tokens_per_row = 100"):
        pack_rows([5, 101], [5, 101], 100, 1)


def test_many_long_sequences_pack_in_a_moment() -> None:
    """Where row counts that are too small are tried before: 1,024 rows of one sequence, and 16,384 mixed lengths, for
    which a search through all full rows for each sequence took over a minute."""
    assert len(pack_rows([20_000] * 1024, [20_000] * 1024, 32_768, 8)) == 1024
    lengths = np.minimum(np.random.default_rng(0).lognormal(8.76, 0.7, 16_384), 20_480).astype(int).tolist()
    started = time.process_time()
    rows = pack_rows(lengths, [COST.of(length) for length in lengths], 32_768, 8)
    assert time.process_time() - started < 3  # measured: 0.15 s
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(16_384))


def greedy_rows(lengths: list[int], costs: list[float], max_tokens: int, multiple: int) -> list[list[int]]:
    """The rule of pack_rows, as its docstring states it."""

    def cost(indices: Iterable[int]) -> float:
        return sum(costs[index] for index in indices)

    num_rows = 0
    while True:
        num_rows += multiple
        ranks: list[list[list[int]]] = [[[] for _ in range(num_rows // multiple)] for _ in range(multiple)]
        for index in sorted(range(len(lengths)), key=lambda index: (-costs[index], index)):
            room = max_tokens - lengths[index]
            with_room = [[row for row in rank if sum(lengths[i] for i in row) <= room] for rank in ranks]
            usable = [rank for rank, rows in enumerate(with_room) if rows]
            if not usable:
                break
            rank = min(usable, key=lambda rank: cost(itertools.chain.from_iterable(ranks[rank])))
            min(with_room[rank], key=cost).append(index)
        else:
            return [sorted(row) for rank in ranks for row in rank]


@pytest.mark.parametrize("seed", range(15))
def test_rows_follow_the_rule(seed: int) -> None:
    """Also if costs do not rise with lengths, so that a short sequence is placed before a long one."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, random.choice([50, 101]), random.integers(1, 80)).tolist()
    costs = {0: [one**2 for one in lengths], 1: lengths, 2: random.integers(1, 9, len(lengths)).tolist()}
    for of_kind in costs.values():
        for multiple in (1, 3):
            assert pack_rows(lengths, of_kind, 100, multiple) == greedy_rows(lengths, of_kind, 100, multiple)


def long_responses(seed: int) -> tuple[list[int], list[float]]:
    """(lengths, costs) of a mini-batch of 256 responses of up to 20,000 tokens."""
    lengths = np.minimum(np.random.default_rng(seed).lognormal(8.3, 1.0, 256), 20_000).astype(int).tolist()
    return lengths, [COST.of(length) for length in lengths]


@pytest.mark.parametrize("seed", range(4))
def test_ranks_that_wait_for_each_other_in_every_row_end_sooner_if_rows_are_packed_by_cost(seed: int) -> None:
    lengths, costs = long_responses(seed)
    times = {}
    for name, by in (("cost", costs), ("tokens", lengths)):
        of_rows = [sum(costs[index] for index in row) for row in pack_rows(lengths, by, 32_768, 8)]
        at_a_time = zip(*share_rows(of_rows, 8), strict=True)
        times[name] = sum(max(of_rows[row] for row in rows) for rows in at_a_time) * 8 / sum(costs) - 1
    assert times["cost"] < times["tokens"]


@pytest.mark.parametrize("seed", range(4))
def test_a_rank_with_a_long_response_gets_less_of_the_others(seed: int) -> None:
    """With two rows a rank, equal rows would leave the rank with the longest response far behind."""
    lengths = np.minimum(np.random.default_rng(seed).lognormal(7.3, 0.8, 256), 20_000).astype(int).tolist()
    costs = [COST.of(length) for length in lengths]
    rows = pack_rows(lengths, costs, 32_768, 16)
    row_costs = [sum(costs[index] for index in row) for row in rows]
    spent = [sum(row_costs[row] for row in share) for share in share_rows(row_costs, 16)]
    assert max(spent) < 1.03 * max(sum(costs) / 16, *costs)


@pytest.mark.parametrize("seed", range(4))
def test_ranks_end_alike(seed: int) -> None:
    lengths, costs = long_responses(seed)
    rows = pack_rows(lengths, costs, 32_768, 8)
    row_costs = [sum(costs[index] for index in row) for row in rows]
    in_order = [list(range(rank, len(rows), 8)) for rank in range(8)]
    assert imbalance(row_costs, share_rows(row_costs, 8)) < min(0.01, 0.5 * imbalance(row_costs, in_order))


@pytest.mark.parametrize(("num_rows", "size"), [(8, 1), (8, 4), (12, 3)])
def test_ranks_share_the_rows_evenly(num_rows: int, size: int) -> None:
    costs = np.random.default_rng(num_rows).random(num_rows).tolist()
    shares = share_rows(costs, size)
    assert sorted(row for share in shares for row in share) == list(range(num_rows))
    assert {len(share) for share in shares} == {num_rows // size}


def test_at_any_time_all_ranks_work_on_rows_of_like_cost() -> None:
    costs = np.random.default_rng(2).lognormal(0, 1, 64).tolist()
    shares = share_rows(costs, 8)
    at_a_time = list(zip(*shares, strict=True))
    for earlier, later in itertools.pairwise(at_a_time):
        assert min(costs[row] for row in earlier) >= max(costs[row] for row in later)


def test_imbalance_is_the_busiest_ranks_surplus() -> None:
    assert imbalance([1.0, 1.0, 1.0, 3.0], [[0, 1], [2, 3]]) == pytest.approx(1 / 3)
    assert imbalance([2.0, 2.0], [[0], [1]]) == 0
    assert imbalance([0.0], [[0]]) == 0
