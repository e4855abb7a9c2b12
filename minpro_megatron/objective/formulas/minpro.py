"""MinPRO: the importance ratio of a token times the smallest ratio before it in its response."""

from minpro_megatron.config.objective import MinproConfig
from minpro_megatron.objective.formulas.clipped_weight import clipped_weight_terms
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def minpro(tokens: PolicyTokens, settings: MinproConfig) -> ObjectiveTerms:
    """MinPRO, arXiv:2601.22718, section 4: weight = clip(m_t * rho_t, 1 - clip_low, 1 + clip_high).

    For ratios (1.5, .5, 2, 30, 1) and the paper's clip of 1 / 4 the weights are (1.5, .75, 1, 5, .5).
    """
    return clipped_weight_terms(tokens, tokens.prefix_minimum_L * tokens.log_ratio_L.exp(), settings)
