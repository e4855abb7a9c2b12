"""CTPO: the clip on the product of the ratios up to a token, or on their geometric mean, with bounds by position."""

from torch import Tensor

from minpro_megatron.config.objective import CtpoConfig, CtpoGeomeanConfig, CtpoSection
from minpro_megatron.objective.formulas.pessimistic_clip import pessimistic_terms
from minpro_megatron.objective.terms import MAX_LOG_RATIO, ObjectiveTerms, PolicyTokens


def ctpo(tokens: PolicyTokens, settings: CtpoConfig) -> ObjectiveTerms:
    """CTPO, arXiv:2605.07331: PPO's clip on r_t = rho_1 * ... * rho_t; the gradient flows only through rho_t.

    Log bounds are -log_clip_low t^p and log_clip_high t^p, the dual clip for A < 0 log_dual_clip t^p, where p is
    position_exponent, 1/2 in the paper; t counts the sequence's trained tokens on all ranks from 1, up to and including
    this one. For A = 2 and ratios (1.04, .96, 1.1) the products are (1.04, .9984, 1.0982) and the upper bounds
    (1.0513, 1.0733, 1.0905): the third token is clipped.
    """
    return _clipped_by_position(tokens, tokens.prefix_log_ratio_L, settings)


def ctpo_geomean(tokens: PolicyTokens, settings: CtpoGeomeanConfig) -> ObjectiveTerms:
    """The variant of CTPO in the code of its authors: PPO's clip on r_t = (rho_1 * ... * rho_t)^(1/t).

    Its bounds shrink with position, position_exponent = -1/2, as the deviation of a mean does. The gradient is that of
    the surrogate of the code, r_t times (rho_t / sg(rho_t)): a token's coefficient is r_t A, not r_t A / t. For A = 2
    and ratios (1.04, .96, 1.1) the means are (1.04, .9992, 1.0317) and the upper bounds (1.0513, 1.0360, 1.0293): the
    third token is clipped.
    """
    return _clipped_by_position(tokens, tokens.prefix_mean_log_ratio_L, settings)


def _clipped_by_position(tokens: PolicyTokens, log_ratio_L: Tensor, settings: CtpoSection) -> ObjectiveTerms:
    if settings.log_clamp is not None:
        log_ratio_L = log_ratio_L.clamp(-settings.log_clamp, settings.log_clamp)
    scale = (tokens.earlier_L + 1) ** settings.position_exponent
    ratio, lower, upper, dual = (
        exponent.clamp(max=MAX_LOG_RATIO).exp()
        for exponent in (
            log_ratio_L,
            -settings.log_clip_low * scale,
            settings.log_clip_high * scale,
            settings.log_dual_clip * scale,
        )
    )
    return pessimistic_terms(tokens, ratio, lower, upper, dual)
