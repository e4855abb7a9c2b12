"""The form - sg(clip(weight)) * advantage * log pi, which MinPRO and CISPO share: every token keeps a gradient."""

import torch
from torch import Tensor

from minpro_megatron.config.objective import ClippedWeightSection
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def clipped_weight_terms(tokens: PolicyTokens, weight_L: Tensor, settings: ClippedWeightSection) -> ObjectiveTerms:
    """The terms of a weight that is clipped to 1 - clip_low .. 1 + clip_high and carries no gradient itself."""
    clipped = torch.clamp(weight_L, 1 - settings.clip_low, 1 + settings.clip_high)
    coefficients = clipped * tokens.advantages_L
    return ObjectiveTerms(
        coefficients, -coefficients * tokens.log_probs_L, clipped, clipped != weight_L, ~tokens.is_trained_L
    )
