"""Supervised fine-tuning: the negative log-prob of given responses."""

import torch

from minpro_megatron.config.objective import SftConfig
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def negative_log_likelihood(tokens: PolicyTokens, settings: SftConfig) -> ObjectiveTerms:
    """- log pi_t for every trained token: no ratio, no advantage, no clip."""
    weight = tokens.is_trained_L.double()
    nothing_clipped = torch.zeros_like(tokens.is_trained_L)
    return ObjectiveTerms(weight, -tokens.log_probs_L.double(), weight, nothing_clipped, ~tokens.is_trained_L)
