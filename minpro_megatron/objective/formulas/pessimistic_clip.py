"""PPO's pessimistic clip of a ratio, which GRPO, GSPO, CTPO and one form of M2PO share."""

import torch
from torch import Tensor

from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def pessimistic_terms(
    tokens: PolicyTokens, ratio_L: Tensor, lower_L: Tensor, upper_L: Tensor, dual_L: Tensor | None
) -> ObjectiveTerms:
    """min(ratio A, clip(ratio) A), for A < 0 at least dual A; no gradient where a clip is active."""
    advantage = tokens.advantages_L
    bounded = torch.clamp(ratio_L, lower_L, upper_L)
    objective = torch.minimum(ratio_L * advantage, bounded * advantage)
    clipped = bounded * advantage < ratio_L * advantage
    if dual_L is not None:
        floor = torch.where(advantage < 0, dual_L * advantage, -torch.inf)
        clipped = clipped | (objective < floor)
        objective = torch.maximum(objective, floor)
    weight = torch.where(clipped, 0.0, ratio_L)
    return ObjectiveTerms(weight * advantage, -objective, weight, clipped, ~tokens.is_trained_L)
