"""Objectives with PPO's pessimistic clip: GRPO."""

import torch

from minpro_megatron.config.objective import GrpoConfig
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def grpo(tokens: PolicyTokens, settings: GrpoConfig) -> ObjectiveTerms:
    """GRPO's token loss with asymmetric clip (arXiv:2402.03300, 2503.14476) and dual clip for A < 0 (1912.09729).

    objective = min(rho A, clip(rho) A), and for A < 0 at least dual_clip * A; no gradient where a clip is active.
    """
    ratio, advantage = tokens.log_ratio_L.exp(), tokens.advantages_L
    bounded = torch.clamp(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
    objective = torch.minimum(ratio * advantage, bounded * advantage)
    floor = torch.where(advantage < 0, settings.dual_clip * advantage, -torch.inf)
    clipped = (bounded * advantage < ratio * advantage) | (objective < floor)
    objective = torch.maximum(objective, floor)
    coefficients = torch.where(clipped, 0.0, ratio * advantage)
    weight = torch.where(clipped, 0.0, ratio)
    return ObjectiveTerms(coefficients, -objective, weight, clipped)
