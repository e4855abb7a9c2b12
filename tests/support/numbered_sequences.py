"""Sequences in which every token id is another one, and the shards of their row."""

import numpy as np

from minpro_megatron.batching.collate import shard_row
from minpro_megatron.batching.row_lengths import padded_length, row_length
from minpro_megatron.batching.row_shard import RankSlice, RowShard
from minpro_megatron.batching.token_sequence import TokenSequence

SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (3, 4)]


def numbered_sequences(seed: int, count: int) -> list[TokenSequence]:
    """Sequences whose token ids are all different, so that a slot tells which token it holds."""
    random = np.random.default_rng(seed)
    sequences, next_id, first_slot = [], 1, 100
    for index in range(count):
        prompt, response = random.integers(1, 8, 2)
        ids = np.arange(next_id, next_id + prompt + response, dtype=np.int32)
        mask = (random.random(response) > 0.4).astype(np.float32)
        if index == 1:
            mask[:] = 0  # trained on nothing
        numbers = random.normal(0, 1, (2, response)).astype(np.float32)
        sequences.append(
            TokenSequence(ids[:prompt], ids[prompt:], mask, numbers[0], numbers[1], float(index) - 0.5, first_slot)
        )
        next_id += int(prompt + response)
        first_slot += int(response)
    return sequences


def all_shards(
    sequences: list[TokenSequence], context_size: int, tensor_size: int, extra: int = 0
) -> dict[tuple[int, int], RowShard]:
    """Every rank's shard of the row with all `sequences`; `extra` multiples of padding at its end."""
    lengths = [padded_length(sequence, context_size) for sequence in sequences]
    tokens = row_length(lengths, context_size, tensor_size)
    tokens += extra * 2 * context_size * tensor_size
    places = [(c, t) for c in range(context_size) for t in range(tensor_size)]
    return {(c, t): shard_row(sequences, tokens, RankSlice(context_size, c, tensor_size, t)) for c, t in places}
