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


def padding_sequences(num_sequences: int, context_size: int) -> list[int]:
    """The lengths of the short sequences of padding that make the number of a row's sequences a power of two.

    Transformer Engine 2.18 and later give cuDNN 9.24 and later the row's boundaries as they are, and keep a graph for
    each number of sequences (use_cu_seqlens_directly in its fused_attn_f16_arbitrary_seqlen.cu). Without this padding a
    rank would prepare a graph whenever it meets a new number, while the other ranks wait. Sequences without tokens
    would do as well, but cuDNN supports them from 9.25 on only (issue 943 of NVIDIA/cudnn-frontend).

    >>> padding_sequences(5, 2)
    [4, 4, 4]
    """
    missing = (1 << (num_sequences - 1).bit_length()) - num_sequences if num_sequences else 0
    return [sequence_multiple(context_size)] * missing


def with_row_padding(lengths: Sequence[int], row_tokens: int) -> list[int]:
    """The lengths of a row's sequences in the row of `row_tokens`, whose padding belongs to its last sequence; a row
    without sequences has one that is all padding."""
    padded = list(lengths) or [0]
    padded[-1] += row_tokens - sum(padded)
    assert padded[-1] >= 0, f"sequences of {sum(lengths)} tokens do not fit a row of {row_tokens}"
    return padded
