"""CPPO: DPPO's trust region, tighter for early tokens and for tokens whose prefix has already diverged."""

from minpro_megatron.config.objective import CppoConfig
from minpro_megatron.objective.formulas.trust_region import DIVERGENCES, ratio_terms
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def cppo(tokens: PolicyTokens, settings: CppoConfig) -> ObjectiveTerms:
    """CPPO, arXiv:2606.10968, equations 8 to 11 and Algorithm 1: the gradient of -rho A on the tokens that are kept.

    With w_t = 1 - (1 - smallest_weight) (t - 1) / (T - 1), where t counts the trained tokens of the sequence from 1 and
    T is their number, and Z_t = w_t D_t, a token is excluded if it moves its ratio away from one, A (rho_t - 1) > 0,
    and Z_t > min(threshold, threshold + budget (w_1 + ... + w_t-1) - (Z_1 + ... + Z_t-1)). The sums are over all
    trained tokens before t, also over the excluded ones.

    For A = 1, threshold .15, budget .06, smallest_weight .8, ratios above 1 and D = (.05, .14, .1, .05) the weights are
    (1, .9333, .8667, .8), Z = (.05, .1307, .0867, .04) and the limits (.15, .15, .0853, .0507): the third token is
    excluded, by the budget and not by the threshold.

    D is estimated from the sampled token (`trust_region` in this folder); the paper uses the 20 most likely tokens and
    finds no difference (figure 6). For base models the paper derives `budget` from the 90 % quantile of each sequence's
    D, between `budget` and twice that; here it is a constant, as the paper has it for post-trained models. The authors'
    implementation for verl has T = the longest response allowed (`horizon`) and ratios up to 20 (`largest_ratio`).
    """
    divergence = DIVERGENCES[settings.divergence](tokens)
    last = tokens.trained_L - 1 if settings.horizon is None else tokens.trained_L.new_full((), settings.horizon - 1)
    progress = (tokens.earlier_L / last.clamp(min=1)).clamp(max=1)
    weight = 1 - (1 - settings.smallest_weight) * progress
    spent = tokens.scan.exclusive(weight * divergence, "sum")
    allowed = tokens.scan.exclusive(weight, "sum")
    limit = (settings.threshold + settings.budget * allowed - spent).clamp(max=settings.threshold)
    away = tokens.advantages_L * tokens.log_ratio_L > 0
    return ratio_terms(tokens, settings.largest_ratio).without(away & (weight * divergence > limit))
