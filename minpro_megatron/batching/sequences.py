"""Converts a batch of collected groups to the sequences that the trainer packs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.objective.advantages import group_advantages, overlong_penalty
from minpro_megatron.records import Batch, BehaviorLogProbs, Response, TrainedStep


def token_sequences(batch: Batch, loss: LossConfig, max_response_tokens: int) -> list[list[TokenSequence]]:
    """[group][response] of `batch`, in canonical order, as global step `batch.index` consumes it; not scored yet.

    `loss` sets how rewards are shaped and how groups with equal rewards are treated.
    """
    groups, first_slot = [], 0
    for group in batch.groups:
        rewards = [response.reward for response in group.responses]
        lengths = [len(response.token_ids) for response in group.responses]
        sampled = [response.num_sampled for response in group.responses]
        if any(response.is_graded for response in group.responses):
            advantages, trained = advantages_and_trained(rewards, lengths, sampled, loss, max_response_tokens)
        else:  # demonstrations, whose loss has no advantage
            advantages, trained = np.zeros(len(rewards), np.float32), True
        sequences = []
        for response, advantage in zip(group.responses, advantages, strict=True):
            num_tokens = len(response.token_ids)
            sequences.append(
                TokenSequence(
                    prompt_ids=group.issued.prompt_token_ids,
                    response_ids=response.token_ids,
                    loss_mask=_loss_mask(response, trained),
                    behavior_log_probs=np.zeros(num_tokens, np.float32),
                    rollout_log_probs=response.rollout_log_probs,
                    advantage=float(advantage),
                    first_slot=first_slot,
                    staleness=_staleness(response, batch.index),
                    routed_experts=response.stored_routes or response.routed_experts,
                    supports=response.stored_supports or response.supports,
                )
            )
            first_slot += num_tokens
        groups.append(sequences)
    return groups


def _loss_mask(response: Response, trained: bool) -> np.ndarray:
    if response.loss_mask is None or not trained:
        return np.full(len(response.token_ids), float(trained), np.float32)
    return response.loss_mask.astype(np.float32)


def _staleness(response: Response, step: int) -> np.ndarray:
    """int32 [response tokens]; 0 for given tokens."""
    staleness = step - response.policy_versions
    return staleness if response.loss_mask is None else np.where(response.loss_mask != 0, staleness, 0)


def sampled_tokens(batch: Batch) -> np.ndarray:
    """bool [all response tokens of the batch in canonical order]: whether the policy sampled the token."""
    masks = [
        np.ones(len(response.token_ids), bool) if response.loss_mask is None else response.loss_mask != 0
        for group in batch.groups
        for response in group.responses
    ]
    return np.concatenate(masks)


def advantages_and_trained(
    rewards: Sequence[float],
    lengths: Sequence[int],
    sampled: Sequence[int],
    loss: LossConfig,
    max_response_tokens: int,
) -> tuple[np.ndarray, bool]:
    """(advantages, float32 [responses]; whether the group's tokens are trained on) of one group, from rewards and
    numbers of tokens: `lengths` with given tokens, as sampling.max_response_tokens counts them, `sampled` without.

    `loss` sets the estimator of the advantage, the penalty for long responses, and whether a group with equal rewards
    is excluded.
    """
    penalty = loss.overlong_penalty
    if penalty.enabled:
        rewards = [
            reward + overlong_penalty(length, max_response_tokens, penalty.buffer_tokens, penalty.scale)
            for reward, length in zip(rewards, lengths, strict=True)
        ]
    trained = loss.equal_reward_groups == "keep" or len(set(rewards)) > 1
    return group_advantages(rewards, loss.advantage, sampled), trained


def with_log_probs(groups: list[list[TokenSequence]], **log_probs: np.ndarray) -> list[list[TokenSequence]]:
    """`groups` with fields such as behavior_log_probs=... filled in.

    Each array is float32 [all response tokens of the batch] in canonical order, as Policy.score returned it.
    """
    num_scored = sum(len(sequence.response_ids) for sequences in groups for sequence in sequences)
    assert all(len(values) == num_scored for values in log_probs.values()), "scores of another batch"
    return [
        [
            replace(
                sequence,
                **{
                    name: values[sequence.first_slot : sequence.first_slot + len(sequence.response_ids)]
                    for name, values in log_probs.items()
                },
            )
            for sequence in sequences
        ]
        for sequences in groups
    ]


def with_known_scores(batch: Batch, fresh: np.ndarray) -> np.ndarray:
    """Behavior log-probs of all response tokens of `batch` in canonical order, float32: those stored in its groups,
    and `fresh` for the groups that have none."""
    pieces, first = [], 0
    for response in (response for group in batch.groups for response in group.responses):
        known = response.behavior_log_probs
        if known is None:
            known = fresh[first : first + len(response.token_ids)]
            first += len(response.token_ids)
        pieces.append(known)
    assert first == len(fresh), "scores of another batch"
    return np.concatenate(pieces)


def behavior_record(batch: Batch, policy_version: int, log_probs: np.ndarray) -> BehaviorLogProbs:
    """The scores of `batch` in the form that is sent to the collector; `log_probs` as in with_log_probs."""
    return BehaviorLogProbs(index=batch.index, policy_version=policy_version, log_probs=_by_response(batch, log_probs))


def trained_step(batch: Batch, policy_version: int, log_probs: Sequence[np.ndarray]) -> TrainedStep:
    """The report to the collector after training on the batch. `log_probs`: those of its mini-batches in order, float32
    [response tokens]; none if they are not recorded."""
    recorded = _by_response(batch, np.concatenate(log_probs)) if log_probs else []
    return TrainedStep(step=batch.index, policy_version=policy_version, log_probs=recorded)


def _by_response(batch: Batch, values: np.ndarray) -> list[list[np.ndarray]]:
    """Splits one value per response token of the batch, in canonical order, into [group][response]. Given tokens get
    NO_LOG_PROB."""
    ends = np.cumsum([len(response.token_ids) for group in batch.groups for response in group.responses])
    assert len(values) == ends[-1], "values of another batch"
    pieces = iter(np.split(values, ends[:-1]))
    return [[response.without_given(next(pieces)) for response in group.responses] for group in batch.groups]
