"""GRPO with DAPO's asymmetric clip and dual clip: the clip on the importance ratio of each token."""

import torch

from minpro_megatron.config.objective import GrpoConfig
from minpro_megatron.objective.formulas.pessimistic_clip import pessimistic_terms
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def grpo(tokens: PolicyTokens, settings: GrpoConfig) -> ObjectiveTerms:
    """GRPO's token loss with asymmetric clip (arXiv:2402.03300, 2503.14476) and dual clip for A < 0 (1912.09729).

    objective = min(rho A, clip(rho) A), and for A < 0 at least dual_clip * A; no gradient where a clip is active.
    """
    ratio = tokens.log_ratio_L.exp()
    lower, upper, dual = (
        torch.full_like(ratio, bound) for bound in (1 - settings.clip_low, 1 + settings.clip_high, settings.dual_clip)
    )
    return pessimistic_terms(tokens, ratio, lower, upper, dual)
