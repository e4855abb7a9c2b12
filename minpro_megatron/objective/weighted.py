"""Objectives of the form - sg(weight) * advantage * log pi: MinPRO, CISPO, and the paper's failed attempts."""

import torch
from torch import Tensor

from minpro_megatron.config.objective import (
    ClippedWeightSection,
    MinproConfig,
    PrefixFilterConfig,
    PrefixRatioConfig,
    ShuffledMinproConfig,
)
from minpro_megatron.objective.terms import LARGEST_LOG_RATIO, ObjectiveTerms, PolicyTokens


def minpro(tokens: PolicyTokens, settings: MinproConfig) -> ObjectiveTerms:
    """MinPRO, arXiv:2601.22718, section 4: weight = clip(m_t * rho_t, 1 - clip_low, 1 + clip_high).

    For ratios (1.5, .5, 2, 30, 1) and the paper's clip of 1 / 4 the weights are (1.5, .75, 1, 5, .5).
    """
    return _weighted_log_prob(tokens, tokens.prefix_minimum_L * tokens.log_ratio_L.exp(), settings)


def cispo(tokens: PolicyTokens, settings: ClippedWeightSection) -> ObjectiveTerms:
    """CISPO, arXiv:2506.13585: weight = clip(rho_t, 1 - clip_low, 1 + clip_high)."""
    return _weighted_log_prob(tokens, tokens.log_ratio_L.exp(), settings)


def prefix_ratio(tokens: PolicyTokens, settings: PrefixRatioConfig) -> ObjectiveTerms:
    """weight = clip(rho_1 * ... * rho_t, 1 - clip_low, 1 + clip_high): arXiv:2601.22718's first failed attempt."""
    ratio = tokens.prefix_log_ratio_L.clamp(max=LARGEST_LOG_RATIO).exp()
    return _weighted_log_prob(tokens, ratio, settings)


def prefix_filter(tokens: PolicyTokens, settings: PrefixFilterConfig) -> ObjectiveTerms:
    """CISPO without the tokens that `surveys.small_prefix_ratios` marks: arXiv:2601.22718's second failed attempt."""
    assert tokens.surveyed_L is not None, "prefix_filter needs its survey"
    return _weighted_log_prob(tokens, tokens.log_ratio_L.exp(), settings).without(tokens.surveyed_L > 0)


def shuffled_minpro(tokens: PolicyTokens, settings: ShuffledMinproConfig) -> ObjectiveTerms:
    """MinPRO with the prefix minima that `surveys.shuffled_prefix_minima` dealt out."""
    assert tokens.surveyed_L is not None, "shuffled_minpro needs its survey"
    return _weighted_log_prob(tokens, tokens.surveyed_L * tokens.log_ratio_L.exp(), settings)


def _weighted_log_prob(tokens: PolicyTokens, weight_L: Tensor, settings: ClippedWeightSection) -> ObjectiveTerms:
    clipped = torch.clamp(weight_L, 1 - settings.clip_low, 1 + settings.clip_high)
    coefficients = clipped * tokens.advantages_L
    return ObjectiveTerms(
        coefficients, -coefficients * tokens.log_probs_L, clipped, clipped != weight_L, ~tokens.is_trained_L
    )
