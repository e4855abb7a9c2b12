"""The record of one rank's share of a packed row, and of the place in the mesh that decides which share it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minpro_megatron.records import StoredArray


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
    routed_experts: Sequence[np.ndarray | StoredArray | None]  # of the whole row's sequences, as in TokenSequence
    # of every tensor rank, because the log-probs of a chunk of tokens are computed together
    sequence_S: np.ndarray  # int64: as sequence_L
    response_index_S: np.ndarray  # int64: the label's index among the response tokens of its sequence, -1 for none
    is_trained_S: np.ndarray  # bool: as mask_L
    response_lengths: Sequence[int]  # of the whole row's sequences
    supports: Sequence[np.ndarray | StoredArray | None]  # of the whole row's sequences, as in TokenSequence
