"""How many tokens sequences and rows take with padding."""

from collections.abc import Sequence

from minpro_megatron.batching.shards import row_multiple, sequence_multiple
from minpro_megatron.batching.token_sequence import TokenSequence


def padded_length(sequence: TokenSequence, context_size: int) -> int:
    """The number of tokens that a sequence takes in a row, padding included."""
    multiple = sequence_multiple(context_size)
    return -(-sequence.num_tokens // multiple) * multiple


def row_length(rows: Sequence[Sequence[int]], lengths: Sequence[int], context_size: int, tensor_size: int) -> int:
    """The common length to which all `rows` are padded: pipeline stages exchange tensors of one shape."""
    multiple = row_multiple(context_size, tensor_size)
    longest = max(sum(lengths[index] for index in row) for row in rows)
    return -(-max(longest, multiple) // multiple) * multiple
