"""CISPO: the importance ratio of a token, clipped, as the weight of its log-prob."""

from minpro_megatron.config.objective import ClippedWeightSection
from minpro_megatron.objective.formulas.clipped_weight import clipped_weight_terms
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def cispo(tokens: PolicyTokens, settings: ClippedWeightSection) -> ObjectiveTerms:
    """CISPO, arXiv:2506.13585: weight = clip(rho_t, 1 - clip_low, 1 + clip_high)."""
    return clipped_weight_terms(tokens, tokens.log_ratio_L.exp(), settings)
