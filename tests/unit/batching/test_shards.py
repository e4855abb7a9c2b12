"""The ranks of a context x tensor mesh together hold every token of a packed row exactly once."""

import numpy as np
import pytest

from minpro_megatron.batching.shards import (
    chunk_halves,
    context_shard,
    row_multiple,
    sequence_multiple,
    tensor_shard,
)

SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (3, 4)]


def padded_row(seed: int, context_size: int, tensor_size: int) -> list[int]:
    """Random sequence lengths that fulfil both multiples, as `shard_row` makes them."""
    random = np.random.default_rng(seed)
    multiple = sequence_multiple(context_size)
    lengths = (random.integers(1, 9, random.integers(1, 6)) * multiple).tolist()
    lengths[-1] += -sum(lengths) % row_multiple(context_size, tensor_size)
    return lengths


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_every_position_is_held_once_and_by_equal_shares(seed: int, sizes: tuple[int, int]) -> None:
    context_size, tensor_size = sizes
    lengths = padded_row(seed, context_size, tensor_size)
    held = []
    for context_rank in range(context_size):
        shard = context_shard(lengths, context_size, context_rank)
        held += [shard[tensor_shard(len(shard), tensor_size, rank)] for rank in range(tensor_size)]
    assert sorted(np.concatenate(held).tolist()) == list(range(sum(lengths)))
    assert {len(piece) for piece in held} == {sum(lengths) // (context_size * tensor_size)}


@pytest.mark.parametrize("context_size", [2, 3, 4])
def test_a_rank_holds_chunk_r_then_chunk_2c_minus_1_minus_r_of_each_sequence(context_size: int) -> None:
    lengths = padded_row(1, context_size, 1)
    starts = np.cumsum([0, *lengths])
    for rank in range(context_size):
        expected = []
        for start, length in zip(starts, lengths, strict=False):
            chunk_of = [position * 2 * context_size // length for position in range(length)]
            for wanted in (rank, 2 * context_size - 1 - rank):
                expected += [start + position for position in range(length) if chunk_of[position] == wanted]
        assert context_shard(lengths, context_size, rank).tolist() == expected


@pytest.mark.parametrize("context_size", [1, 2, 4])
def test_halves_tell_the_front_chunk_from_the_back_chunk(context_size: int) -> None:
    lengths = padded_row(2, context_size, 1)
    starts = np.cumsum([0, *lengths])
    halves = chunk_halves(lengths, context_size)
    for rank in range(context_size):
        shard = context_shard(lengths, context_size, rank)
        sequence = np.searchsorted(starts, shard, side="right") - 1
        chunk = (shard - starts[sequence]) * 2 * context_size // np.array(lengths)[sequence]
        expected = (chunk != rank) if context_size > 1 else np.zeros(len(shard))
        assert halves.tolist() == expected.astype(int).tolist()


def test_tensor_pieces_follow_one_another() -> None:
    pieces = [np.arange(12)[tensor_shard(12, 4, rank)].tolist() for rank in range(4)]
    assert pieces == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_lengths_that_cannot_be_cut_are_bugs() -> None:
    with pytest.raises(AssertionError, match="6 tokens cannot be divided into 4 chunks"):
        context_shard([8, 6], 2, 0)
    with pytest.raises(AssertionError, match="7 tokens cannot be divided into 2"):
        tensor_shard(7, 2, 0)
