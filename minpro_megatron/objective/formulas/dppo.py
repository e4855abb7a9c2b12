"""DPPO: the importance ratio as the weight, without the tokens whose probability left a trust region."""

from minpro_megatron.config.objective import DppoConfig
from minpro_megatron.objective.formulas.trust_region import DIVERGENCES, ratio_terms
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def dppo(tokens: PolicyTokens, settings: DppoConfig) -> ObjectiveTerms:
    """DPPO, arXiv:2602.04879, equations 12 and 23: loss = -sg(min(rho, C)) A log pi on the tokens that are kept.

    A token is excluded if it moves away from the sampling policy (A > 0 and pi > mu, or A < 0 and pi < mu) and its
    divergence exceeds the threshold of its side. With the total variation these are A > 0 and pi - mu > threshold_high,
    A < 0 and pi - mu < -threshold_low. For A = 1, threshold .2, mu = (.5, .5, .5, .01) and pi = (.6, .8, .1, .2) the
    weights are (1.2, 0, .2, 20): the third token moves back, and a ratio of 20 alone does not exclude the fourth.

    The paper's mu is the server's. Here it is the policy of the ratio's denominator, the behavior log-probs. The
    objective of the paper has no C; its large runs have C = 5 (appendix E), its authors' implementation in verl 20.
    """
    divergence = DIVERGENCES[settings.divergence](tokens)
    away_up = (tokens.advantages_L > 0) & (tokens.log_ratio_L > 0) & (divergence > settings.threshold_high)
    away_down = (tokens.advantages_L < 0) & (tokens.log_ratio_L < 0) & (divergence > settings.threshold_low)
    return ratio_terms(tokens, settings.largest_ratio).without(away_up | away_down)
