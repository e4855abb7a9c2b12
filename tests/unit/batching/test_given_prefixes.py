"""A given prefix is context: it has no loss and no ratio, and no scan sees it, whatever stands in its place."""

import msgspec
import numpy as np
import pytest
import torch

from minpro_megatron.batching.collate import shard_row
from minpro_megatron.batching.row_lengths import padded_length, row_length
from minpro_megatron.batching.row_shard import RankSlice, RowShard
from minpro_megatron.batching.sequences import token_sequences, with_log_probs
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.config.objective import TrmConfig
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import PolicyTokens, policy_tokens, summed_loss, summed_value
from minpro_megatron.records import Batch, CollectedGroup
from tests.support.batches import make_group
from tests.support.ragged_tokens import DEFAULTS

QUESTION_TOKENS, PREFIX_TOKENS, LENGTHS = 3, 9, [5, 2, 7]
# trm's own limit would exclude all of the sequences; this one excludes two of three.
SETTINGS = DEFAULTS | {"trm": TrmConfig(max_divergence=0.15)}
# Surveys look at the same PolicyTokens that are compared here.
WITHOUT_SURVEY = sorted(name for name, objective in OBJECTIVES.items() if objective.survey is None)


def group(num_prefix_tokens: int, first_prefix_id: int = 50) -> CollectedGroup:
    """A group whose prompt is the question and then that many tokens of a prefix, as prompts.prompts joins them."""
    made = make_group(1, QUESTION_TOKENS, [1.0, 0.0, 1.0], LENGTHS)
    prefix = first_prefix_id + np.arange(num_prefix_tokens, dtype=np.int32)
    prompt_ids = np.concatenate([made.issued.prompt_token_ids, prefix])
    return msgspec.structs.replace(made, issued=msgspec.structs.replace(made.issued, prompt_token_ids=prompt_ids))


def row_of(collected: CollectedGroup) -> RowShard:
    """The group's responses with drifting behavior log-probs, packed into one row of one rank."""
    batch = Batch(index=0, groups=[collected])
    behavior = np.random.default_rng(0).normal(-1, 0.5, sum(LENGTHS)).astype(np.float32)
    (sequences,) = with_log_probs(token_sequences(batch, LossConfig(), 8), behavior_log_probs=behavior)
    lengths = [padded_length(sequence, 1) for sequence in sequences]
    return shard_row(sequences, row_length(lengths, 1, 1), RankSlice(1, 0, 1, 0))


def log_probs_of(row: RowShard, elsewhere: float) -> torch.Tensor:
    """The policy's: a function of the token's place among the responses; `elsewhere` in all other slots."""
    of_responses = np.random.default_rng(1).normal(-1, 0.5, sum(LENGTHS))
    values = np.where(row.flat_slot_L >= 0, of_responses[row.flat_slot_L], elsewhere)
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def tokens_of(row: RowShard, log_probs: torch.Tensor) -> PolicyTokens:
    mask = torch.from_numpy(row.mask_L)
    # masked slots hold garbage of their own
    behavior = torch.where(mask > 0, torch.from_numpy(row.behavior_log_probs_L), -3.0)
    return policy_tokens(
        log_probs,
        behavior,
        torch.from_numpy(row.advantages_L),
        mask,
        WholeSequenceScan(torch.from_numpy(row.sequence_L), mask),
        torch.from_numpy(row.flat_slot_L),
    )


def of_responses(row: RowShard, values: torch.Tensor) -> np.ndarray:
    """The values of the response tokens in canonical order."""
    taken = row.flat_slot_L >= 0
    return values.detach().numpy()[taken][np.argsort(row.flat_slot_L[taken])]


@pytest.mark.parametrize("elsewhere", [-40.0, 0.0, float("nan"), float("-inf")])
@pytest.mark.parametrize("name", WITHOUT_SURVEY)
def test_loss_coefficients_and_gradient_are_those_without_a_prefix(name: str, elsewhere: float) -> None:
    found, losses = [], []
    for collected, masked in ((group(0), -1.0), (group(PREFIX_TOKENS), elsewhere), (group(PREFIX_TOKENS, 900), 0.5)):
        row = row_of(collected)
        log_probs = log_probs_of(row, masked)
        terms = OBJECTIVES[name].terms(tokens_of(row, log_probs), SETTINGS[name])
        weight = torch.from_numpy(row.mask_L)
        summed_loss(log_probs, terms, weight).backward()
        assert log_probs.grad is not None
        assert not log_probs.grad[torch.from_numpy(row.flat_slot_L < 0)].any()
        assert int(row.mask_L.sum()) == row.num_tokens == sum(LENGTHS)
        parts = (terms.value_L, terms.coefficients_L, terms.weight_L, log_probs.grad)
        found.append([of_responses(row, part) for part in parts])
        losses.append(summed_value(terms, weight).item())
    for other in found[1:]:
        for plain, prefixed in zip(found[0], other, strict=True):
            np.testing.assert_allclose(prefixed, plain, rtol=1e-12)  # sums take other ways through longer rows
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)
    assert np.ptp(found[0][0]) > 0  # there is something to compare


def test_scans_begin_at_the_first_response_token() -> None:
    """A prefix as long as the responses, with ratios of e^-20 if it had any."""
    row = row_of(group(PREFIX_TOKENS))
    tokens = tokens_of(row, log_probs_of(row, -40.0))
    ratios = of_responses(row, tokens.log_ratio_L.exp())
    firsts = np.cumsum([0, *LENGTHS[:-1]])
    minima = of_responses(row, tokens.prefix_minimum_L)
    assert minima[firsts].tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(minima[firsts + 1], ratios[firsts])
    assert of_responses(row, tokens.earlier_L)[firsts].tolist() == [0, 0, 0]
    np.testing.assert_allclose(of_responses(row, tokens.prefix_log_ratio_L.exp())[firsts], ratios[firsts])
    assert minima.min() > 0.01


def test_what_the_model_sees_of_a_prefix_is_all_of_it() -> None:
    """The first response token is predicted from the prefix's last token, at its place behind question and prefix."""
    row = row_of(group(PREFIX_TOKENS))
    first = int(np.flatnonzero(row.flat_slot_L == 0)[0])
    assert row.input_ids_S[: first + 1].tolist() == [7, 8, 9, *range(50, 50 + PREFIX_TOKENS)]
    assert row.position_ids_S[first] == QUESTION_TOKENS + PREFIX_TOKENS - 1
