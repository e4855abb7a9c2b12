"""GSPO: the clip on the geometric mean of a sequence's importance ratios."""

import torch

from minpro_megatron.config.objective import GspoConfig
from minpro_megatron.objective.formulas.pessimistic_clip import pessimistic_terms
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def gspo(tokens: PolicyTokens, settings: GspoConfig) -> ObjectiveTerms:
    """GSPO, arXiv:2507.18071: PPO's clip on s = exp(mean of log rho over the sequence's trained tokens).

    Every token of a sequence has the sequence's value. With sequence-mean aggregation the gradient is that of
    min(s A, clip(s) A) summed over sequences, because d s / d log pi_t = s / trained tokens.
    """
    ratio = tokens.sequence_mean_log_ratio_L.exp()
    lower, upper = (torch.full_like(ratio, bound) for bound in (1 - settings.clip_low, 1 + settings.clip_high))
    return pessimistic_terms(tokens, ratio, lower, upper, dual_L=None)
