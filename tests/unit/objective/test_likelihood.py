"""The loss of supervised fine-tuning, against a loop over the tokens."""

import numpy as np
import pytest
import torch

from minpro_megatron.config.objective import SftConfig
from minpro_megatron.objective.registry import OBJECTIVES, objective_for
from minpro_megatron.objective.terms import summed_loss, summed_value
from tests.support.ragged_tokens import random_tokens


def test_it_is_the_negative_log_prob_whatever_ratio_and_advantage_are() -> None:
    tokens = random_tokens(3)
    seen = tokens.for_objective(torch.float64)
    terms = objective_for(SftConfig()).terms(seen, SftConfig())
    expected = -sum(float(p) for p, trained in zip(tokens.log_probs, tokens.mask, strict=True) if trained)
    assert float(summed_value(terms, seen.mask_L)) == pytest.approx(expected, rel=1e-12)
    assert 0 < int(seen.is_trained_L.sum()) < len(tokens.mask)
    log_probs = torch.tensor(tokens.log_probs, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(summed_loss(log_probs, terms, seen.mask_L), log_probs)
    np.testing.assert_array_equal(slope.numpy(), -np.where(tokens.mask > 0, 1.0, 0.0))


def test_it_is_not_an_objective_of_sampled_responses() -> None:
    assert "sft" not in OBJECTIVES
    assert not SftConfig().compares_policies
