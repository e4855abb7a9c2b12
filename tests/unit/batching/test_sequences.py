"""Groups become the sequences that are packed, in canonical order, and scores find their way back."""

import msgspec
import numpy as np
import pytest

from minpro_megatron.batching.sequences import behavior_record, token_sequences, with_log_probs
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.loss import LossConfig, OverlongPenaltyConfig
from minpro_megatron.records import Batch, decode, encode
from tests.support.batches import make_batch, make_group
from tests.support.episodes import as_episode


def sequences_of(batch: Batch, loss: LossConfig | None = None) -> list[list[TokenSequence]]:
    return token_sequences(batch, loss or LossConfig(), max_response_tokens=8)


def flat_scores(batch: Batch) -> np.ndarray:
    """A score for each response token that says which token it is for."""
    ids = [response.token_ids for group in batch.groups for response in group.responses]
    return -np.concatenate(ids).astype(np.float32)


def test_every_response_is_a_sequence_with_its_groups_advantage() -> None:
    batch = make_batch()
    groups = sequences_of(batch)
    assert [len(group) for group in groups] == [2, 2, 2]
    half = 0.5**0.5
    advantages = [[round(s.advantage, 4) for s in group] for group in groups]
    assert advantages == [[round(half, 4), -round(half, 4)], [0.0, 0.0], [-round(half, 4), round(half, 4)]]
    for group, sequences in zip(batch.groups, groups, strict=True):
        for response, sequence in zip(group.responses, sequences, strict=True):
            assert sequence.prompt_ids.tolist() == group.issued.prompt_token_ids.tolist()
            assert sequence.response_ids.tolist() == response.token_ids.tolist()
            assert sequence.rollout_log_probs.tolist() == response.rollout_log_probs.tolist()
            assert sequence.loss_mask.tolist() == [1.0] * len(response.token_ids)
            assert sequence.num_tokens == len(group.issued.prompt_token_ids) + len(response.token_ids)


def test_an_advantage_by_lengths_counts_sampled_tokens_and_the_penalty_all_of_them() -> None:
    """A response of 5 tokens of which an environment gave 3 costs as much as one of 2, but uses the limit up."""
    group = make_group(1, 3, [1.0, 1.0], [5, 2])
    responses = [as_episode(group.responses[0], [1, 0, 0, 0, 1]), group.responses[1]]
    batch = Batch(index=0, groups=[msgspec.structs.replace(group, responses=responses)])
    loss = LossConfig(advantage="docs.examples.advantage:shorter_is_better", equal_reward_groups="keep")
    assert [sequence.advantage for sequence in token_sequences(batch, loss, max_response_tokens=8)[0]] == [0.0, 0.0]
    penalty = OverlongPenaltyConfig(enabled=True, buffer_tokens=6, scale=6.0)
    penalized = token_sequences(batch, LossConfig(overlong_penalty=penalty), max_response_tokens=8)[0]
    assert [round(sequence.advantage, 4) for sequence in penalized] == [-round(0.5**0.5, 4), round(0.5**0.5, 4)]


def test_routes_of_the_servers_stay_with_their_response() -> None:
    batch = make_batch()
    assert all(sequence.routed_experts is None for group in sequences_of(batch) for sequence in group)
    routes = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    first = batch.groups[1]
    responses = [first.responses[0], msgspec.structs.replace(first.responses[1], routed_experts=routes)]
    groups = [batch.groups[0], msgspec.structs.replace(first, responses=responses), batch.groups[2]]
    received = decode(Batch, encode(Batch(index=4, groups=groups)))
    scored = with_log_probs(sequences_of(received), behavior_log_probs=flat_scores(received))
    (carried,) = [sequence for group in scored for sequence in group if sequence.routed_experts is not None]
    assert carried is scored[1][1]
    np.testing.assert_array_equal(carried.routed_experts, routes)
    assert carried.routed_experts is not None
    assert carried.routed_experts.dtype == np.uint8


def test_each_token_gets_its_own_score_and_flat_slot() -> None:
    batch = make_batch()
    scores = flat_scores(batch)
    sequences = [
        sequence for group in with_log_probs(sequences_of(batch), behavior_log_probs=scores) for sequence in group
    ]
    assert [sequence.first_slot for sequence in sequences] == [0, 5, 7, 8, 12, 15]
    for sequence in sequences:
        assert sequence.behavior_log_probs.tolist() == (-sequence.response_ids.astype(np.float32)).tolist()


def test_before_scoring_the_behavior_log_probs_are_zeros() -> None:
    for group in sequences_of(make_batch()):
        for sequence in group:
            assert sequence.behavior_log_probs.tolist() == [0.0] * len(sequence.response_ids)
            assert sequence.behavior_log_probs.dtype == np.float32


def test_scores_go_back_by_group_and_response() -> None:
    batch = make_batch()
    record = behavior_record(batch, 2, flat_scores(batch))
    assert (record.index, record.policy_version) == (4, 2)
    for group, scored in zip(batch.groups, record.log_probs, strict=True):
        for response, log_probs in zip(group.responses, scored, strict=True):
            assert log_probs.tolist() == (-response.token_ids.astype(np.float32)).tolist()


def test_a_batch_that_came_over_the_wire_gives_the_same_sequences() -> None:
    batch = make_batch()
    received = decode(Batch, encode(batch))  # its arrays are read-only views of the message
    for ours, theirs in zip(sequences_of(batch), sequences_of(received), strict=True):
        for sequence, other in zip(ours, theirs, strict=True):
            for name, value in vars(sequence).items():
                np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


@pytest.mark.parametrize("error", [-1, 1])
def test_scores_of_another_batch_are_a_bug(error: int) -> None:
    batch = make_batch()
    scores = np.zeros(len(flat_scores(batch)) + error, np.float32)
    with pytest.raises(AssertionError, match="another batch"):
        with_log_probs(sequences_of(batch), behavior_log_probs=scores)
    with pytest.raises(AssertionError, match="another batch"):
        behavior_record(batch, 0, scores)


def test_equal_reward_groups_are_kept_or_masked() -> None:
    kept = sequences_of(make_batch())
    masked = sequences_of(make_batch(), LossConfig(equal_reward_groups="mask"))
    counts = [[sequence.num_trained_tokens for sequence in group] for group in kept]
    assert [[sequence.num_trained_tokens for sequence in group] for group in masked] == [counts[0], [0, 0], counts[2]]
    assert all(counts[1])


@pytest.mark.parametrize(("name", "size"), [("group_mean", 0.5), ("leave_one_out", 1.0)])
def test_the_loss_selects_the_estimator_of_the_advantage(name: str, size: float) -> None:
    found = sequences_of(make_batch(), LossConfig.model_validate({"advantage": name}))
    advantages = [[sequence.advantage for sequence in group] for group in found]
    assert advantages == [[size, -size], [0.0, 0.0], [-size, size]]


def test_the_overlong_penalty_changes_rewards_before_the_advantage() -> None:
    penalty = OverlongPenaltyConfig(enabled=True, buffer_tokens=8)
    for plain, shaped in zip(
        sequences_of(make_batch()), sequences_of(make_batch(), LossConfig(overlong_penalty=penalty)), strict=True
    ):
        if plain[0].advantage == 0:  # equal rewards: the longer response is now the worse one
            longer = int(len(shaped[1].response_ids) > len(shaped[0].response_ids))
            assert shaped[longer].advantage < -0.5 < 0.5 < shaped[1 - longer].advantage


def test_staleness_counts_from_each_tokens_version_to_the_step_that_consumes_it() -> None:
    batch = make_batch()
    for group, sequences in zip(batch.groups, sequences_of(batch), strict=True):
        for response, sequence in zip(group.responses, sequences, strict=True):
            assert sequence.staleness is not None
            assert (sequence.staleness + response.policy_versions).tolist() == [batch.index] * len(response.token_ids)
