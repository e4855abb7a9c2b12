"""Objectives of the form - sg(weight) * advantage * log pi: MinPRO and CISPO."""

import torch
from torch import Tensor

from minpro_megatron.config.objective import CispoConfig, MinproConfig
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens, prefix_minimum


def minpro(tokens: PolicyTokens, settings: MinproConfig) -> ObjectiveTerms:
    """MinPRO, arXiv:2601.22718, section 4: weight = clip(m_t * rho_t, 1 - clip_low, 1 + clip_high).

    For ratios (1.5, .5, 2, 30, 1) and the paper's clip of 1 / 4 the weights are (1.5, .75, 1, 5, .5).
    """
    weight = prefix_minimum(tokens) * tokens.log_ratio_L.exp()
    return _weighted_log_prob(tokens, weight, settings.clip_low, settings.clip_high)


def cispo(tokens: PolicyTokens, settings: CispoConfig) -> ObjectiveTerms:
    """CISPO, arXiv:2506.13585: weight = clip(rho_t, 1 - clip_low, 1 + clip_high)."""
    return _weighted_log_prob(tokens, tokens.log_ratio_L.exp(), settings.clip_low, settings.clip_high)


def _weighted_log_prob(tokens: PolicyTokens, weight_L: Tensor, clip_low: float, clip_high: float) -> ObjectiveTerms:
    clipped = torch.clamp(weight_L, 1 - clip_low, 1 + clip_high)
    coefficients = clipped * tokens.advantages_L
    return ObjectiveTerms(coefficients, -coefficients * tokens.log_probs_L, clipped, clipped != weight_L)
