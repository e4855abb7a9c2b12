"""Packing loses no sequence, overfills no row and gives every rank as many rows."""

import numpy as np
import pytest

from minpro_megatron.batching.packing import pack_rows, rows_of_rank


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_row_within_capacity(seed: int, multiple: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 101, random.integers(1, 60)).tolist()
    rows = pack_rows(lengths, 100, multiple)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 100 for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert len(rows) % multiple == 0
    assert rows == pack_rows(list(lengths), 100, multiple)


def test_no_row_is_empty_while_there_are_as_many_sequences() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        lengths = random.integers(1, 101, random.integers(8, 60)).tolist()
        rows = pack_rows(lengths, 100, 4)
        assert len(lengths) < len(rows) or all(rows)


def test_rows_come_out_alike() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, 400).tolist()
    filled = [sum(lengths[index] for index in row) for row in pack_rows(lengths, 1000, 4)]
    assert max(filled) - min(filled) <= 30
    assert len(filled) == 24  # 20,000 tokens; the fewest rows in fours that hold them


def test_the_fewest_rows_are_taken() -> None:
    assert len(pack_rows([50, 50, 50, 50], 100, 1)) == 2
    assert len(pack_rows([60, 60, 60, 40], 100, 1)) == 3
    assert pack_rows([3], 100, 4) == [[0], [], [], []]
    assert len(pack_rows([100] * 6, 100, 4)) == 8


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 101 tokens.*batch.max_tokens_per_row = 100"):
        pack_rows([5, 101], 100, 1)


def test_many_long_sequences_pack_in_a_moment() -> None:
    rows = pack_rows([20_000] * 1024, 32_768, 8)  # one each: many row counts are tried before
    assert len(rows) == 1024


@pytest.mark.parametrize(("num_rows", "size"), [(8, 1), (8, 4), (12, 3)])
def test_ranks_share_the_rows_evenly(num_rows: int, size: int) -> None:
    shares = [list(rows_of_rank(num_rows, size, rank)) for rank in range(size)]
    assert sorted(row for share in shares for row in share) == list(range(num_rows))
    assert {len(share) for share in shares} == {num_rows // size}
