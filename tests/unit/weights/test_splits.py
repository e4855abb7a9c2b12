"""Splits are exact rearrangements, and put every row where Megatron looks for it."""

import pytest
import torch
from torch import Tensor

from minpro_megatron.weights.splits import GatedPair, QueryGroups, Replicated, ShardedAlong, Split, Vocabulary


def random_bits(*shape: int) -> Tensor:
    """bfloat16 of random bits, NaNs and infinities among them: a round trip that computes would change some."""
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.contiguous().view(torch.int16), expected.contiguous().view(torch.int16))


CASES: list[tuple[str, Split, list[tuple[int, ...]], list[int]]] = [
    ("whole", Replicated(), [(17,)], [1, 3]),
    ("rows", ShardedAlong(0), [(12, 5)], [1, 2, 3]),
    ("columns", ShardedAlong(1), [(5, 12)], [1, 2, 4]),
    ("vocabulary", Vocabulary(128), [(77, 3)], [1, 2, 4, 8]),
    ("full vocabulary", Vocabulary(128), [(128, 1)], [1, 2]),
    ("gated pair", GatedPair(), [(6, 5), (6, 5)], [1, 2, 3]),
    ("one query a group", QueryGroups(3, 3, 2), [(6, 7), (6, 7), (6, 7)], [1, 3]),
    ("grouped queries", QueryGroups(12, 4, 3), [(36, 5), (12, 5), (12, 5)], [1, 2, 4]),
    ("one group", QueryGroups(5, 1, 4), [(20, 3), (4, 3), (4, 3)], [1]),
]


@pytest.mark.parametrize(("split", "shapes", "sizes"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_round_trips_are_bit_exact(split: Split, shapes: list[tuple[int, ...]], sizes: list[int]) -> None:
    tensors = [random_bits(*shape) for shape in shapes]
    full = split.join(tensors)
    for found, expected in zip(split.part(full, [len(tensor) for tensor in tensors]), tensors, strict=True):
        assert_same_bits(found, expected)
    for size in sizes:
        shards = [split.shard(full, rank, size) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        assert_same_bits(split.merge(shards), full)


def test_query_groups_are_queries_then_key_then_value_group_by_group() -> None:
    heads, groups, width = 6, 3, 2
    query, key, value = torch.arange(12), 100 + torch.arange(6), 200 + torch.arange(6)
    full = QueryGroups(heads, groups, width).join([rows[:, None] for rows in (query, key, value)])[:, 0]
    expected = []
    for group in range(groups):
        for head in range(group * 2, group * 2 + 2):  # two query heads share a key head
            expected += [head * width, head * width + 1]
        expected += [100 + group * width, 100 + group * width + 1]
        expected += [200 + group * width, 200 + group * width + 1]
    assert full.tolist() == expected


def test_each_tensor_rank_holds_whole_query_groups() -> None:
    split = QueryGroups(8, 4, 2)
    query, key, value = [random_bits(rows, 3) for rows in (16, 8, 8)]
    for size in (2, 4):
        for rank in range(size):
            shard = split.shard(split.join([query, key, value]), rank, size)
            own = [tensor.chunk(size)[rank] for tensor in (query, key, value)]
            assert_same_bits(shard, QueryGroups(8 // size, 4 // size, 2).join(own))


def test_each_tensor_rank_holds_its_gate_above_its_up_projection() -> None:
    gate, up = torch.arange(6)[:, None], 100 + torch.arange(6)[:, None]
    split = GatedPair()
    shards = [split.shard(split.join([gate, up]), rank, 3)[:, 0].tolist() for rank in range(3)]
    assert shards == [[0, 1, 100, 101], [2, 3, 102, 103], [4, 5, 104, 105]]


def test_vocabulary_padding_is_zero_and_left_out_again() -> None:
    full = Vocabulary(8).join([torch.ones(5, 2)])
    assert full.sum(dim=1).tolist() == [2, 2, 2, 2, 2, 0, 0, 0]
    assert Vocabulary(8).part(full, [5])[0].shape == (5, 2)


@pytest.mark.parametrize(("split", "shapes"), [(c[1], c[2]) for c in CASES], ids=[c[0] for c in CASES])
def test_runs_name_every_row_once_and_in_order(split: Split, shapes: list[tuple[int, ...]]) -> None:
    rows = [shape[0] for shape in shapes]
    for source, count in enumerate(rows):
        runs = [run for run in split.runs(rows) if run.source == source]
        assert [row for run in runs for row in range(run.first, run.first + run.count)] == list(range(count))
    assert split.full_rows(rows) == len(split.join([random_bits(*shape) for shape in shapes]))


def test_gate_and_up_projection_are_blocks_of_their_own() -> None:
    assert [len(block) for block in GatedPair().blocks([6, 6])] == [1, 1]
    assert [len(block) for block in QueryGroups(4, 2, 1).blocks([4, 2, 2])] == [6]


@pytest.mark.parametrize("rows", [(12, 6, 5), (11, 6, 6), (12, 8, 6)])
def test_tensors_that_would_lose_rows_are_refused(rows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"do not make a parameter of \[12, 6, 6\] rows"):
        QueryGroups(6, 3, 2).join([torch.ones(count, 2) for count in rows])
