"""CTPO: the clip on the product of the ratios up to a token, with bounds that grow with its position."""

from minpro_megatron.config.objective import CtpoConfig
from minpro_megatron.objective.pessimistic_clip import pessimistic_terms
from minpro_megatron.objective.terms import MAX_LOG_RATIO, ObjectiveTerms, PolicyTokens


def ctpo(tokens: PolicyTokens, settings: CtpoConfig) -> ObjectiveTerms:
    """CTPO, arXiv:2605.07331: PPO's clip on r_t = rho_1 * ... * rho_t; the gradient flows only through rho_t.

    Log bounds are -log_clip_low * sqrt(t) and log_clip_high * sqrt(t), the dual clip for A < 0 log_dual_clip * sqrt(t);
    t counts the sequence's trained tokens on all ranks from 1, up to and including this one.
    """
    log_ratio = tokens.prefix_log_ratio_L
    if settings.log_clamp is not None:
        log_ratio = log_ratio.clamp(-settings.log_clamp, settings.log_clamp)
    root = (tokens.earlier_L + 1).sqrt()
    ratio, lower, upper, dual = (
        exponent.clamp(max=MAX_LOG_RATIO).exp()
        for exponent in (
            log_ratio,
            -settings.log_clip_low * root,
            settings.log_clip_high * root,
            settings.log_dual_clip * root,
        )
    )
    return pessimistic_terms(tokens, ratio, lower, upper, dual)
