"""M2PO: plain importance weighting without the tokens that make the update unsafe."""

from minpro_megatron.config.objective import M2poConfig
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def m2po(tokens: PolicyTokens, settings: M2poConfig) -> ObjectiveTerms:
    """M2PO, arXiv:2510.01161, Algorithm 1: objective = rho A, without what `surveys.large_second_moments` marks.

    Tokens left out stay in the denominator: the mask multiplies the token's term, as in the paper's objective.
    """
    assert tokens.surveyed_L is not None, "m2po needs its survey"
    ratio = tokens.log_ratio_L.exp()
    objective = ratio * tokens.advantages_L
    never = tokens.mask_L < 0
    return ObjectiveTerms(objective, -objective, ratio, never, ~tokens.is_trained_L).without(tokens.surveyed_L > 0)
