"""The form - sg(weight) * advantage * log pi: the weight carries no gradient, and no clip stops that of log pi."""

import torch
from torch import Tensor

from minpro_megatron.config.objective import ClippedWeightSection
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def clipped_weight_terms(tokens: PolicyTokens, weight_L: Tensor, settings: ClippedWeightSection) -> ObjectiveTerms:
    """The terms of a weight that is clipped to 1 - clip_low .. 1 + clip_high, as MinPRO and CISPO have them."""
    clipped = torch.clamp(weight_L, 1 - settings.clip_low, 1 + settings.clip_high)
    return weighted_terms(tokens, clipped, clipped != weight_L)


def weighted_terms(tokens: PolicyTokens, weight_L: Tensor, clipped_L: Tensor) -> ObjectiveTerms:
    """The terms of `weight_L`, of which `clipped_L` says where a clip changed it."""
    coefficients = weight_L * tokens.advantages_L
    return ObjectiveTerms(coefficients, -coefficients * tokens.log_probs_L, weight_L, clipped_L, ~tokens.is_trained_L)
