"""Where policy and sampling policy are the same, every objective has the gradient of REINFORCE with the advantages.

Every paper says so of its objective: at a ratio of 1 no clip and no mask acts, and every weight is 1.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minpro_megatron.config.loss import LossConfig
from minpro_megatron.metrics.metric import values
from minpro_megatron.objective.corrections import OtherLogProbs, corrected
from minpro_megatron.objective.diagnostics import as_metrics, token_statistics
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import summed_loss, summed_value
from tests.support.objective_settings import OTHERS
from tests.support.ragged_tokens import DEFAULTS, Tokens, long_tokens, random_tokens, surveyed

EVERYTHING = LossConfig.model_validate(
    {
        "sequence_importance": {"enabled": True},
        "rejection": {"enabled": True},
        "off_policy_masking": {"enabled": True, "largest_mean_log_ratio": 0.0},
        "decoupled": {"enabled": True},
        "kl": {"enabled": True},
    }
)


def on_policy(tokens: Tokens) -> Tokens:
    return replace(tokens, behavior=tokens.log_probs)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("settings", [DEFAULTS, OTHERS], ids=["papers", "others"])
@pytest.mark.parametrize("loss", [LossConfig(), EVERYTHING], ids=["alone", "with corrections"])
def test_on_policy_the_gradient_is_reinforces(loss: LossConfig, settings: dict, name: str) -> None:
    for tokens in (on_policy(random_tokens(80)), on_policy(long_tokens(81))):
        (seen,) = surveyed(name, [tokens.for_objective(torch.float64)], settings[name])
        same = torch.tensor(tokens.log_probs)
        terms = OBJECTIVES[name].terms(seen, settings[name])
        terms, _ = corrected(terms, seen, OtherLogProbs(same, same, same, same), loss)
        assert not terms.excluded_L.numpy()[tokens.trained].any()
        log_probs = torch.tensor(tokens.log_probs, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(summed_loss(log_probs, terms, seen.mask_L), log_probs)
        reinforce = -(torch.tensor(tokens.mask * tokens.advantages).double() * log_probs).sum()
        (expected,) = torch.autograd.grad(reinforce, log_probs)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.learning_rate_factor])
def test_on_policy_the_learning_rate_is_not_scaled(name: str) -> None:
    tokens = on_policy(random_tokens(82))
    seen, same = tokens.for_objective(torch.float64), torch.tensor(tokens.log_probs)
    terms = OBJECTIVES[name].terms(seen, DEFAULTS[name])
    loss = (summed_value(terms, seen.mask_L), float(seen.mask_L.sum()))
    statistics = token_statistics(seen, terms, same, OtherLogProbs(same, same, same, same), seen.ids_L * 0, loss)
    factor = OBJECTIVES[name].learning_rate_factor
    assert factor is not None
    assert values(as_metrics([statistics])[0])[factor] == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_off_policy_it_is_another(name: str) -> None:
    """So that the test above can fail."""
    tokens = random_tokens(83, drift=1.0)
    (seen,) = surveyed(name, [tokens.for_objective(torch.float64)], DEFAULTS[name])
    found = OBJECTIVES[name].terms(seen, DEFAULTS[name]).coefficients_L.numpy()
    assert np.abs(found - tokens.advantages)[tokens.trained].max() > 0.1
