"""The loss of a mini-batch is the mean of its tokens' or its sequences' losses, however they are packed in rows."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch

from minpro_megatron.batching.collate import shard_row
from minpro_megatron.batching.row_shard import RankSlice
from minpro_megatron.batching.sequences import token_sequences, with_log_probs
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.config.objective import Aggregation, CtpoConfig, GspoConfig, MinproConfig
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import policy_tokens, summed_loss, summed_value
from minpro_megatron.records import Batch
from tests.support.batches import make_group
from tests.support.objective_loops import LOOPS, expected_loss
from tests.support.ragged_tokens import Tokens

WHOLE = RankSlice(context_size=1, context_rank=0, tensor_size=1, tensor_rank=0)
REWARDS = [[1.0, 0.0, 0.25], [0.5, 0.5, 0.5], [0.0], [0.0, 2.0]]  # equal ones, and a group of one
LENGTHS = [[5, 1, 12], [3, 30, 2], [4], [17, 6]]
PACKINGS = [[[0, 1, 2, 3, 4, 5, 6, 7, 8]], [[8, 2, 5], [0, 1], [4], [], [6, 7, 3]]]
SETTINGS: dict[str, Any] = {
    "minpro": MinproConfig(),
    "gspo": GspoConfig(clip_low=0.2, clip_high=0.2),
    "ctpo": CtpoConfig(log_clip_low=0.5, log_clip_high=0.5, log_dual_clip=0.5),
}
Treatment = Literal["keep", "mask"]


def mini_batch(treatment: Treatment) -> tuple[list[TokenSequence], np.ndarray]:
    """The sequences of groups with REWARDS as the trainer makes them, with holes; and the current log-probs."""
    groups = [
        make_group(index, 2 + index, rewards, lengths)
        for index, (rewards, lengths) in enumerate(zip(REWARDS, LENGTHS, strict=True))
    ]
    random = np.random.default_rng(81)
    count = sum(map(sum, LENGTHS))
    log_probs = -random.exponential(1.0, count).astype(np.float32)
    behavior = (log_probs - random.normal(0, 0.5, count)).astype(np.float32)
    made = token_sequences(Batch(index=0, groups=groups), LossConfig(equal_reward_groups=treatment), 64)
    sequences = [one for group in with_log_probs(made, behavior_log_probs=behavior) for one in group]
    holes = [(random.random(len(one.response_ids)) > 0.3).astype(np.float32) for one in sequences]
    holes[0][:] = 0  # a sequence without a trained token
    return [replace(one, loss_mask=one.loss_mask * hole) for one, hole in zip(sequences, holes, strict=True)], log_probs


def as_tokens(sequences: Sequence[TokenSequence], log_probs: np.ndarray, treatment: Treatment) -> Tokens:
    """The same tokens with advantages and masks by their definitions."""
    advantages, trained = [], []
    for rewards in REWARDS:
        equal = len(set(rewards)) == 1
        mean = statistics.fmean(rewards)
        spread = 1.0 if equal else statistics.stdev(rewards) + 1e-6
        advantages += [(reward - mean) / spread for reward in rewards]
        trained += [0.0 if equal and treatment == "mask" else 1.0] * len(rewards)
    return Tokens(
        log_probs=log_probs,
        behavior=np.concatenate([one.behavior_log_probs for one in sequences]),
        # float32, as they travel
        advantages=np.repeat(np.array(advantages, np.float32), [len(one.response_ids) for one in sequences]),
        mask=np.concatenate([one.loss_mask * on for one, on in zip(sequences, trained, strict=True)]),
        sequence=np.repeat(np.arange(len(sequences)), [len(one.response_ids) for one in sequences]),
    )


def found_loss(
    name: str, sequences: list[TokenSequence], log_probs: np.ndarray, aggregation: Aggregation, rows: list[list[int]]
) -> tuple[float, np.ndarray]:
    """As the trainer has it: sums over the slots of every row, divided by all rows' counts."""
    length = max(sum(sequences[index].num_tokens for index in row) for row in rows)
    loss, count, gradient = 0.0, 0, np.zeros(len(log_probs))
    for row in rows:
        shard = shard_row([sequences[index] for index in row], length, WHOLE)
        mask, ids = torch.from_numpy(shard.mask_L), shard.flat_slot_L
        of_slots = torch.from_numpy(np.where(ids >= 0, log_probs[ids], -1.0)).requires_grad_()
        tokens = policy_tokens(
            of_slots,
            torch.from_numpy(shard.behavior_log_probs_L),
            torch.from_numpy(shard.advantages_L),
            mask,
            WholeSequenceScan(torch.from_numpy(shard.sequence_L), mask),
            torch.from_numpy(ids),
        )
        terms = OBJECTIVES[name].terms(tokens, SETTINGS[name])
        weight = mask if aggregation == "token_mean" else torch.from_numpy(shard.sequence_weight_L)
        summed_loss(of_slots, terms, weight).backward()
        assert of_slots.grad is not None
        gradient[ids[ids >= 0]] = of_slots.grad.numpy()[ids >= 0]
        loss += float(summed_value(terms, weight))
        count += shard.num_tokens if aggregation == "token_mean" else shard.num_sequences
    return loss / count, gradient / count


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize("treatment", get_args(Treatment))
def test_the_loss_is_the_mean_of_tokens_or_of_sequences(
    treatment: Treatment, aggregation: Aggregation, name: str
) -> None:
    sequences, log_probs = mini_batch(treatment)
    tokens = as_tokens(sequences, log_probs, treatment)
    loss, gradient = expected_loss(LOOPS[name](tokens, SETTINGS[name]), tokens, aggregation)
    assert np.count_nonzero(gradient) >= 10
    for rows in PACKINGS:
        found, slope = found_loss(name, sequences, log_probs, aggregation, rows)
        assert found == pytest.approx(loss, rel=1e-6)
        np.testing.assert_allclose(slope, gradient, rtol=1e-6, atol=1e-6 * np.abs(gradient).max())


def test_equal_rewards_have_no_gradient_and_count_only_if_kept() -> None:
    kept, masked = (mini_batch(treatment)[0] for treatment in get_args(Treatment))
    of_equal_groups = range(3, 7)  # the second group, and the group of one
    for index, (one, other) in enumerate(zip(kept, masked, strict=True)):
        if index in of_equal_groups:
            assert one.advantage == other.advantage == 0
            assert one.num_trained_tokens > 0
            assert other.num_trained_tokens == 0
        else:
            assert one.advantage == other.advantage
            assert one.advantage != 0
            assert (one.loss_mask == other.loss_mask).all()


def test_without_a_trained_token_sums_and_counts_are_zero() -> None:
    sequences, _ = mini_batch("keep")
    silent = [replace(one, loss_mask=np.zeros_like(one.loss_mask)) for one in sequences]
    for row in (silent, []):
        shard = shard_row(row, 128, WHOLE)
        assert (shard.num_tokens, shard.num_sequences) == (0, 0)
        assert not shard.mask_L.any()
        assert not shard.sequence_weight_L.any()


def test_an_empty_response_takes_no_part() -> None:
    sequences, log_probs = mini_batch("keep")
    nothing = np.zeros(0, np.float32)
    empty = replace(
        sequences[0],
        response_ids=np.zeros(0, np.int32),
        loss_mask=nothing,
        behavior_log_probs=nothing,
        rollout_log_probs=nothing,
        staleness=np.zeros(0, np.int32),
        first_slot=len(log_probs),
    )
    alone = found_loss("minpro", sequences, log_probs, "sequence_mean", PACKINGS[0])
    joined = found_loss(
        "minpro", [*sequences, empty], log_probs, "sequence_mean", [[*PACKINGS[0][0][:4], 9, *range(4, 9)]]
    )
    assert joined[0] == pytest.approx(alone[0], rel=1e-12)
    np.testing.assert_array_equal(joined[1], alone[1])
