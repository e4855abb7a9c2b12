"""Builds the mini-batches of the replay's optimizer updates from stored rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minpro_megatron.batching.sequences import advantages_and_trained
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.replay.rollouts import Rollout


@dataclass(frozen=True)
class ReplayBatch:
    """The sequences of one optimizer update, group by group, and the row of each in the file."""

    rows: list[int]  # from 0
    sequences: list[TokenSequence]

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def num_trained_tokens(self) -> int:
        return sum(sequence.num_trained_tokens for sequence in self.sequences)


def replay_batches(
    rollouts: Sequence[Rollout], groups_per_batch: int | None, loss: LossConfig, max_response_tokens: int
) -> list[ReplayBatch]:
    """Mini-batches of `groups_per_batch` groups (the last may have fewer; None: one mini-batch of all).

    A group consists of all rows with the same `group`, at any position; groups are in the order of their first rows.
    """
    groups: dict[str, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(row)
    members = list(groups.values())
    size = groups_per_batch or len(members)
    return [
        _batch(rollouts, members[first : first + size], loss, max_response_tokens)
        for first in range(0, len(members), size)
    ]


def _batch(
    rollouts: Sequence[Rollout], groups: Sequence[Sequence[int]], loss: LossConfig, max_response_tokens: int
) -> ReplayBatch:
    rows, sequences, first_slot = [], [], 0
    for group in groups:
        rewards = [rollouts[row].reward for row in group]
        lengths = [len(rollouts[row].response_ids) for row in group]
        sampled = [int(np.count_nonzero(rollouts[row].loss_mask)) for row in group]
        advantages, trained = advantages_and_trained(rewards, lengths, sampled, loss, max_response_tokens)
        for row, advantage in zip(group, advantages, strict=True):
            rollout = rollouts[row]
            mask = rollout.loss_mask if trained else np.zeros_like(rollout.loss_mask)
            sequences.append(
                TokenSequence(
                    prompt_ids=rollout.prompt_ids,
                    response_ids=rollout.response_ids,
                    loss_mask=mask,
                    behavior_log_probs=rollout.behavior_log_probs,
                    rollout_log_probs=rollout.rollout_log_probs,
                    advantage=float(advantage),
                    first_slot=first_slot,
                    supports=rollout.supports,
                )
            )
            rows.append(row)
            first_slot += len(rollout.response_ids)
    return ReplayBatch(rows, sequences)
