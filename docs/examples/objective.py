"""An example of an objective: a weight that approaches 2 smoothly where CISPO's weight is clipped.

    objective.name=docs.examples.objective:smooth_cispo objective.settings.scale=1.5

tests/unit/repository/test_examples.py compares it with a loop over tokens and computes a loss with it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def smooth_cispo(tokens: PolicyTokens, settings: Mapping[str, Any]) -> ObjectiveTerms:
    """The weight of the advantage is s rho_t / (1 + rho_t), below s for every rho_t, and 1 for rho_t = 1 with the
    default of the setting `scale`, s = 2.

    All tensors are of the local slots, without gradient; `log_ratio_L` is log rho_t in float64, 0 where masked. The
    coefficient of a token is minus the derivative of the loss with respect to its log-prob.
    """
    ratio = tokens.log_ratio_L.exp()
    weight = settings.get("scale", 2.0) * ratio / (1 + ratio)
    coefficients = weight * tokens.advantages_L
    return ObjectiveTerms(
        coefficients_L=coefficients,
        value_L=-coefficients * tokens.log_probs_L,
        weight_L=weight,
        clipped_L=torch.zeros_like(tokens.is_trained_L),
        excluded_L=~tokens.is_trained_L,
    )
