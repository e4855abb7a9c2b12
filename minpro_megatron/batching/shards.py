"""Assigns the tokens of a packed row to ranks. Index arithmetic on numpy arrays; no process groups.

A packed row is a series of sequences, each padded to a multiple of 2C for C context ranks. Context parallelism divides
every sequence into 2C equal chunks and gives rank r chunks r and 2C-1-r (zig-zag: causal attention then costs every
rank the same). Sequence parallelism divides a context rank's tokens into equal contiguous pieces, one per tensor rank.
"""

from collections.abc import Sequence

import numpy as np


def row_multiple(context_size: int, tensor_size: int) -> int:
    """A packed row's length must be a multiple of this so that every rank has the same number of tokens."""
    return 2 * context_size * tensor_size if context_size > 1 else tensor_size


def sequence_multiple(context_size: int) -> int:
    """A sequence inside a row must be padded to a multiple of this."""
    return 2 * context_size if context_size > 1 else 1


def context_shard(padded_lengths: Sequence[int], context_size: int, context_rank: int) -> np.ndarray:
    """Positions in the packed row of the tokens of `context_rank`, in the order of its slots. int64 [row / C].

    >>> context_shard([4, 8], 2, 0).tolist()
    [0, 3, 4, 5, 10, 11]
    """
    if context_size == 1:
        return np.arange(sum(padded_lengths))
    pieces, start = [], 0
    for length in padded_lengths:
        chunk, remainder = divmod(length, 2 * context_size)
        assert not remainder, f"a sequence of {length} tokens cannot be divided into {2 * context_size} chunks"
        for place in (context_rank, 2 * context_size - 1 - context_rank):
            pieces.append(np.arange(start + place * chunk, start + (place + 1) * chunk))
        start += length
    return np.concatenate(pieces)


def tensor_shard(num_tokens: int, tensor_size: int, tensor_rank: int) -> slice:
    """The contiguous part of a context rank's `num_tokens` that sequence parallelism gives to `tensor_rank`."""
    size, remainder = divmod(num_tokens, tensor_size)
    assert not remainder, f"{num_tokens} tokens cannot be divided into {tensor_size} equal pieces"
    return slice(tensor_rank * size, (tensor_rank + 1) * size)


def chunk_halves(padded_lengths: Sequence[int], context_size: int) -> np.ndarray:
    """For each token of a context rank: 0 in a sequence's front chunk, 1 in its back chunk. int64 [row / C].

    Without context parallelism every token is in half 0: the sequence is one chunk.
    """
    if context_size == 1:
        return np.zeros(sum(padded_lengths), dtype=np.int64)
    chunks = [length // (2 * context_size) for length in padded_lengths]
    return np.concatenate([np.repeat([0, 1], chunk) for chunk in chunks])
