"""Collates token sequences into one rank's shard of a packed row.

Everything about a token is put into the slot of the token *before* it, whose hidden state predicts it. This is done
before the row is sharded: a shift after sharding would lose the tokens at the shard boundaries.
"""

from collections.abc import Sequence

import numpy as np

from minpro_megatron.batching.row_lengths import padded_length, with_row_padding
from minpro_megatron.batching.row_shard import RankSlice, RowShard
from minpro_megatron.batching.shards import chunk_halves, context_shard, tensor_shard
from minpro_megatron.batching.token_sequence import TokenSequence

_PER_TOKEN = ("behavior_log_probs", "rollout_log_probs", "proximal_log_probs", "reference_log_probs", "staleness")


def shard_row(
    sequences: Sequence[TokenSequence], row_tokens: int, place: RankSlice, padding: Sequence[int] = ()
) -> RowShard:
    """This rank's share of the packed row that holds `sequences` and is padded to `row_tokens`.

    `padding` are the lengths of further sequences that are all padding (row_lengths.padding_sequences). The rest of the
    row's padding belongs to its last sequence; a row without sequences has one sequence that is all padding. The
    token ids of padding are those of the row in turn, so that routers send it to many experts, and not to the few of
    one id.
    """
    own = [padded_length(sequence, place.context_size) for sequence in sequences]
    lengths = with_row_padding([*own, *padding], row_tokens)
    row = _whole_row(sequences, lengths)
    held = context_shard(lengths, place.context_size, place.context_rank)
    piece = tensor_shard(len(held), place.tensor_size, place.tensor_rank)
    local = held[piece]
    return RowShard(
        padded_lengths=lengths,
        input_ids_S=row["input_ids"][held],
        position_ids_S=row["position_ids"][held],
        label_ids_S=row["label_ids"][held],
        num_tokens=int(row["mask"][held].sum()),
        num_sequences=int(row["first_trained"][held].sum()),
        behavior_log_probs_L=row["behavior_log_probs"][local],
        rollout_log_probs_L=row["rollout_log_probs"][local],
        proximal_log_probs_L=row["proximal_log_probs"][local],
        reference_log_probs_L=row["reference_log_probs"][local],
        advantages_L=row["advantages"][local],
        mask_L=row["mask"][local],
        sequence_weight_L=row["sequence_weight"][local],
        sequence_L=row["sequence"][local],
        half_L=chunk_halves(lengths, place.context_size)[piece],
        flat_slot_L=row["flat_slot"][local],
        staleness_L=row["staleness"][local],
        position_L=row["position_ids"][local],
        routed_experts=[sequence.routed_experts for sequence in sequences],
        sequence_S=row["sequence"][held],
        response_index_S=row["response_index"][held],
        is_trained_S=row["mask"][held] > 0,
        response_lengths=[len(sequence.response_ids) for sequence in sequences],
        supports=[sequence.supports for sequence in sequences],
    )


def _whole_row(sequences: Sequence[TokenSequence], lengths: Sequence[int]) -> dict[str, np.ndarray]:
    total = sum(lengths)
    ids = np.concatenate([part for one in sequences for part in (one.prompt_ids, one.response_ids)] or [np.zeros(1)])
    row = {
        "input_ids": np.resize(ids, total).astype(np.int64),
        "label_ids": np.zeros(total, np.int64),
        "flat_slot": np.full(total, -1, np.int64),
        "response_index": np.full(total, -1, np.int64),
        "staleness": np.zeros(total, np.int64),
        "sequence": np.repeat(np.arange(len(lengths)), lengths),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
    }
    for name in (
        "mask",
        "sequence_weight",
        "behavior_log_probs",
        "rollout_log_probs",
        "proximal_log_probs",
        "reference_log_probs",
        "advantages",
        "first_trained",
    ):
        row[name] = np.zeros(total, np.float32)
    start = 0
    for sequence, length in zip(sequences, lengths, strict=False):
        assert len(sequence.prompt_ids), "a response without a prompt: its first token has no slot before it"
        ids = np.concatenate([sequence.prompt_ids, sequence.response_ids])
        row["input_ids"][start : start + len(ids)] = ids
        row["label_ids"][start : start + len(ids) - 1] = ids[1:]
        first = start + len(sequence.prompt_ids) - 1  # this slot's hidden state predicts the first response token
        response = slice(first, first + len(sequence.response_ids))
        row["mask"][response] = sequence.loss_mask
        trained = np.flatnonzero(sequence.loss_mask)
        if len(trained):
            row["sequence_weight"][response] = sequence.loss_mask / len(trained)
            row["first_trained"][first + trained[0]] = 1
        for name in _PER_TOKEN:
            values = getattr(sequence, name)
            row[name][response] = 0 if values is None else values
        row["advantages"][response] = sequence.advantage
        row["response_index"][response] = np.arange(len(sequence.response_ids))
        row["flat_slot"][response] = sequence.first_slot + np.arange(len(sequence.response_ids))
        start += length
    return row
