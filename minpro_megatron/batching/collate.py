"""Collates token sequences into one rank's shard of a packed row.

Everything about a token is put into the slot of the token *before* it, whose hidden state predicts it. This is done
before the row is sharded: a shift after sharding would lose the tokens at the shard boundaries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minpro_megatron.batching.shards import (
    chunk_halves,
    context_shard,
    row_multiple,
    sequence_multiple,
    tensor_shard,
)
from minpro_megatron.records import StoredRoutes

PER_TOKEN = ("behavior_log_probs", "rollout_log_probs", "proximal_log_probs", "reference_log_probs", "staleness")


@dataclass(frozen=True)
class TokenSequence:
    """One prompt with one response, and the values that the objective needs. Arrays cover the response's tokens."""

    prompt_ids: np.ndarray  # int32 [prompt tokens]
    response_ids: np.ndarray  # int32 [response tokens]
    loss_mask: np.ndarray  # float32 [response tokens]: 1 where the token is trained on
    behavior_log_probs: np.ndarray  # float32 [response tokens]; zeros while scoring
    rollout_log_probs: np.ndarray  # float32 [response tokens]
    advantage: float
    first_slot: int  # where the response's tokens start in the batch's flat token array
    proximal_log_probs: np.ndarray | None = None  # float32 [response tokens]; None if the loss does not use them
    reference_log_probs: np.ndarray | None = None
    staleness: np.ndarray | None = None  # int32 [response tokens], in global steps; None: 0
    # the experts that the server chose, uint8 or int16 [all tokens but the last, layers, experts per token]
    routed_experts: np.ndarray | StoredRoutes | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_trained_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))


@dataclass(frozen=True)
class RankSlice:
    """A rank's coordinates on the axes along which a row is sharded."""

    context_size: int
    context_rank: int
    tensor_size: int
    tensor_rank: int


@dataclass(frozen=True)
class RowShard:
    """A rank's share of one packed row. S: tokens of the context shard; L: tokens of its sequence-parallel piece."""

    padded_lengths: list[int]  # of the whole row's sequences
    input_ids_S: np.ndarray  # int64
    position_ids_S: np.ndarray  # int64
    label_ids_S: np.ndarray  # int64: the next token (0 in a sequence's last slot, where the mask is 0)
    num_tokens: int  # number of trained tokens of the context shard: the same on all its tensor ranks
    num_sequences: int  # number of sequences whose first trained token is in the context shard
    behavior_log_probs_L: np.ndarray  # float32
    rollout_log_probs_L: np.ndarray  # float32
    proximal_log_probs_L: np.ndarray  # float32
    reference_log_probs_L: np.ndarray  # float32
    advantages_L: np.ndarray  # float32
    mask_L: np.ndarray  # float32: 1 where the label is a trained response token
    sequence_weight_L: np.ndarray  # float32: mask / trained tokens of the sequence
    sequence_L: np.ndarray  # int64: index in the row of the sequence that a slot belongs to
    half_L: np.ndarray  # int64: 0 in the sequence's front chunk, 1 in its back chunk
    flat_slot_L: np.ndarray  # int64: the label's index in the batch's flat response-token array, -1 for none
    staleness_L: np.ndarray  # int64: global steps
    position_L: np.ndarray  # int64: the slot's position in its sequence, padding included
    routed_experts: Sequence[np.ndarray | StoredRoutes | None]  # of the whole row's sequences, as in TokenSequence


def padded_length(sequence: TokenSequence, context_size: int) -> int:
    """The number of tokens that a sequence takes in a row, padding included."""
    multiple = sequence_multiple(context_size)
    return -(-sequence.num_tokens // multiple) * multiple


def row_length(rows: Sequence[Sequence[int]], lengths: Sequence[int], context_size: int, tensor_size: int) -> int:
    """The common length to which all `rows` are padded: pipeline stages exchange tensors of one shape."""
    multiple = row_multiple(context_size, tensor_size)
    longest = max(sum(lengths[index] for index in row) for row in rows)
    return -(-max(longest, multiple) // multiple) * multiple


def shard_row(sequences: Sequence[TokenSequence], row_tokens: int, place: RankSlice) -> RowShard:
    """This rank's share of the packed row that holds `sequences` and is padded to `row_tokens`.

    The row's padding belongs to its last sequence; a row without sequences has one sequence that is all padding.
    """
    lengths = [padded_length(sequence, place.context_size) for sequence in sequences] or [0]
    lengths[-1] += row_tokens - sum(lengths)
    assert lengths[-1] >= 0, f"sequences of {sum(lengths)} tokens do not fit a row of {row_tokens}"
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
    )


def _whole_row(sequences: Sequence[TokenSequence], lengths: Sequence[int]) -> dict[str, np.ndarray]:
    total = sum(lengths)
    row = {
        "input_ids": np.zeros(total, np.int64),
        "label_ids": np.zeros(total, np.int64),
        "flat_slot": np.full(total, -1, np.int64),
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
        for name in PER_TOKEN:
            values = getattr(sequence, name)
            row[name][response] = 0 if values is None else values
        row["advantages"][response] = sequence.advantage
        row["flat_slot"][response] = sequence.first_slot + np.arange(len(sequence.response_ids))
        start += length
    return row
