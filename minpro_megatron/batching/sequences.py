"""From a batch of collected groups to the sequences that the trainer packs."""

import numpy as np

from minpro_megatron.batching.collate import TokenSequence
from minpro_megatron.objective.advantages import group_advantages
from minpro_megatron.records import Batch, BehaviorLogProbs


def token_sequences(batch: Batch, behavior_log_probs: np.ndarray | None = None) -> list[list[TokenSequence]]:
    """[group][response] of `batch`, in canonical order.

    `behavior_log_probs` is float32 [all response tokens of the batch] in canonical order, as Policy.score returned
    it; None while the batch is still to be scored.
    """
    groups, first_slot = [], 0
    num_scored = sum(len(response.token_ids) for group in batch.groups for response in group.responses)
    assert behavior_log_probs is None or len(behavior_log_probs) == num_scored, "scores of another batch"
    for group in batch.groups:
        advantages = group_advantages([response.reward for response in group.responses])
        sequences = []
        for response, advantage in zip(group.responses, advantages, strict=True):
            num_tokens = len(response.token_ids)
            span = slice(first_slot, first_slot + num_tokens)
            scored = np.zeros(num_tokens, np.float32) if behavior_log_probs is None else behavior_log_probs[span]
            sequences.append(
                TokenSequence(
                    prompt_ids=group.issued.prompt_token_ids,
                    response_ids=response.token_ids,
                    loss_mask=np.ones(num_tokens, np.float32),
                    behavior_log_probs=scored,
                    rollout_log_probs=response.rollout_log_probs,
                    advantage=float(advantage),
                    first_slot=first_slot,
                )
            )
            first_slot += num_tokens
        groups.append(sequences)
    return groups


def behavior_record(batch: Batch, policy_version: int, log_probs: np.ndarray) -> BehaviorLogProbs:
    """The scores of `batch` as they go back to the collector; `log_probs` as in token_sequences."""
    ends = np.cumsum([len(response.token_ids) for group in batch.groups for response in group.responses])
    assert len(log_probs) == ends[-1], "scores of another batch"
    pieces = iter(np.split(log_probs, ends[:-1]))
    return BehaviorLogProbs(
        index=batch.index,
        policy_version=policy_version,
        log_probs=[[next(pieces) for _ in group.responses] for group in batch.groups],
    )
