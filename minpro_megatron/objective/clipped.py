"""Objectives with PPO's pessimistic clip on some ratio: GRPO, GSPO, CTPO, M2PO as its authors' code has it."""

import torch
from torch import Tensor

from minpro_megatron.config.objective import CtpoConfig, GrpoConfig, GspoConfig, M2poWinsorizedConfig
from minpro_megatron.objective.terms import LARGEST_LOG_RATIO, ObjectiveTerms, PolicyTokens


def grpo(tokens: PolicyTokens, settings: GrpoConfig) -> ObjectiveTerms:
    """GRPO's token loss with asymmetric clip (arXiv:2402.03300, 2503.14476) and dual clip for A < 0 (1912.09729).

    objective = min(rho A, clip(rho) A), and for A < 0 at least dual_clip * A; no gradient where a clip is active.
    """
    ratio = tokens.log_ratio_L.exp()
    lower, upper, dual = (
        torch.full_like(ratio, bound) for bound in (1 - settings.clip_low, 1 + settings.clip_high, settings.dual_clip)
    )
    return _pessimistic(tokens, ratio, lower, upper, dual)


def gspo(tokens: PolicyTokens, settings: GspoConfig) -> ObjectiveTerms:
    """GSPO, arXiv:2507.18071: PPO's clip on s = exp(mean of log rho over the sequence's trained tokens).

    Every token of a sequence has the sequence's value; with sequence-mean aggregation the gradient is that of
    min(s A, clip(s) A) summed over sequences, for d s / d log pi_t = s / trained tokens.
    """
    total = tokens.scan.whole(tokens.log_ratio_L, "sum")
    count = tokens.scan.whole(tokens.mask_L, "sum").clamp(min=1)
    ratio = (total / count).exp()
    lower, upper = (torch.full_like(ratio, bound) for bound in (1 - settings.clip_low, 1 + settings.clip_high))
    return _pessimistic(tokens, ratio, lower, upper, dual_L=None)


def ctpo(tokens: PolicyTokens, settings: CtpoConfig) -> ObjectiveTerms:
    """CTPO, arXiv:2605.07331: PPO's clip on r_t = rho_1 * ... * rho_t, the gradient flowing through rho_t alone.

    Log bounds are -log_clip_low * sqrt(t) and log_clip_high * sqrt(t), the dual clip for A < 0 log_dual_clip * sqrt(t);
    t counts the sequence's trained tokens from 1, this one included, whoever holds them.
    """
    log_ratio = tokens.prefix_log_ratio_L
    if settings.log_clamp is not None:
        log_ratio = log_ratio.clamp(-settings.log_clamp, settings.log_clamp)
    root = (tokens.earlier_L + 1).sqrt()
    ratio, lower, upper, dual = (
        exponent.clamp(max=LARGEST_LOG_RATIO).exp()
        for exponent in (
            log_ratio,
            -settings.log_clip_low * root,
            settings.log_clip_high * root,
            settings.log_dual_clip * root,
        )
    )
    return _pessimistic(tokens, ratio, lower, upper, dual)


def m2po_winsorized(tokens: PolicyTokens, settings: M2poWinsorizedConfig) -> ObjectiveTerms:
    """M2PO as the code of arXiv:2510.01161's authors has it: PPO's clip at exp(-+ tau), no dual clip.

    tau is one number for the mini-batch (`surveys.winsorizing_log_ratio`); the clip is never tighter than
    1 - clip_low and 1 + clip_high.
    """
    assert tokens.surveyed_L is not None, "m2po_winsorized needs its survey"
    ratio = tokens.log_ratio_L.exp()
    lower = (-tokens.surveyed_L).exp().clamp(max=1 - settings.clip_low)
    upper = tokens.surveyed_L.exp().clamp(min=1 + settings.clip_high)
    return _pessimistic(tokens, ratio, lower, upper, dual_L=None)


def _pessimistic(
    tokens: PolicyTokens, ratio_L: Tensor, lower_L: Tensor, upper_L: Tensor, dual_L: Tensor | None
) -> ObjectiveTerms:
    """min(ratio A, clip(ratio) A), for A < 0 at least dual A; no gradient where a clip is active."""
    advantage = tokens.advantages_L
    bounded = torch.clamp(ratio_L, lower_L, upper_L)
    objective = torch.minimum(ratio_L * advantage, bounded * advantage)
    clipped = bounded * advantage < ratio_L * advantage
    if dual_L is not None:
        floor = torch.where(advantage < 0, dual_L * advantage, -torch.inf)
        clipped = clipped | (objective < floor)
        objective = torch.maximum(objective, floor)
    weight = torch.where(clipped, 0.0, ratio_L)
    return ObjectiveTerms(weight * advantage, -objective, weight, clipped, ~tokens.is_trained_L)
