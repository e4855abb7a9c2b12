"""How many tokens sequences and rows take with padding."""

from collections.abc import Sequence

from minpro_megatron.batching.shards import row_multiple, sequence_multiple
from minpro_megatron.batching.token_sequence import TokenSequence


def padded_length(sequence: TokenSequence, context_size: int) -> int:
    """The number of tokens that a sequence takes in a row, padding included."""
    multiple = sequence_multiple(context_size)
    return -(-sequence.num_tokens // multiple) * multiple


def row_length(lengths: Sequence[int], context_size: int, tensor_size: int) -> int:
    """The number of tokens to which a row of sequences with these padded lengths is padded: the smallest that every
    rank can divide.

    Every row has its own length. Padding all rows to the longest one would undo their balance, because rows of equal
    cost differ in length: many short sequences take more tokens than a few long ones.
    """
    multiple = row_multiple(context_size, tensor_size)
    return -(-max(sum(lengths), multiple) // multiple) * multiple


def with_row_padding(lengths: Sequence[int], row_tokens: int) -> list[int]:
    """The lengths of a row's sequences in the row of `row_tokens`, whose padding belongs to its last sequence; a row
    without sequences has one that is all padding."""
    padded = list(lengths) or [0]
    padded[-1] += row_tokens - sum(padded)
    assert padded[-1] >= 0, f"sequences of {sum(lengths)} tokens do not fit a row of {row_tokens}"
    return padded
