"""M2PO: importance weights without the tokens that make the update unsafe, in two forms.

`m2po` masks these tokens, as the paper's Algorithm 1 does; `m2po_winsorized` clips, as the code of its authors does.
"""

import torch
from torch import Tensor

from minpro_megatron.config.objective import M2poConfig, M2poWinsorizedConfig
from minpro_megatron.objective.across_ranks.ranking import boundary, smallest
from minpro_megatron.objective.formulas.pessimistic_clip import pessimistic_terms
from minpro_megatron.objective.survey import gather_selected, scatter_selected
from minpro_megatron.objective.terms import MAX_LOG_RATIO, MiniBatch, ObjectiveTerms, PolicyTokens


def m2po(tokens: PolicyTokens, settings: M2poConfig) -> ObjectiveTerms:
    """M2PO, arXiv:2510.01161, Algorithm 1: objective = rho A, without the tokens that `large_second_moments` marks.

    Excluded tokens still count in the denominator: the mask multiplies the token's term, as in the paper's objective.
    """
    assert tokens.surveyed_L is not None, "m2po needs its survey"
    ratio = tokens.log_ratio_L.exp()
    objective = ratio * tokens.advantages_L
    never = tokens.mask_L < 0
    return ObjectiveTerms(objective, -objective, ratio, never, ~tokens.is_trained_L).without(tokens.surveyed_L > 0)


def large_second_moments(mini_batch: MiniBatch, settings: M2poConfig) -> list[Tensor]:
    """1 for each token that M2PO excludes: arXiv:2510.01161, Algorithm 1.

    Harmful tokens are those that push further away from the old policy: A > 0 with ratio > 1, or A < 0 with ratio < 1.
    The harmful tokens with the largest squared log-ratios are excluded: the smallest number of them for which the mean
    square of the remaining harmful tokens is at most `second_moment`. Of equal squares, the tokens that come first in
    the mini-batch are kept.
    """
    harmful = [_harmful(tokens) for tokens in mini_batch.micro_batches]
    squares = gather_selected([tokens.log_ratio_L**2 for tokens in mini_batch.micro_batches], harmful)
    ids = gather_selected([tokens.ids_L for tokens in mini_batch.micro_batches], harmful)
    limit = settings.second_moment
    edge = boundary(squares, lambda count, total, edge: total <= limit * count, mini_batch.ranks)
    if edge is None:
        return [torch.zeros_like(tokens.log_ratio_L) for tokens in mini_batch.micro_batches]
    # keep the largest number n of tokens whose square equals the edge with total + n edge <= limit (count + n)
    room = (limit * edge.count_below - edge.total_below) / (edge.value - limit) if edge.value > limit else 0.0
    kept = smallest(squares, ids, edge.count_below + int(room), mini_batch.ranks)
    return scatter_selected(~kept, harmful, mini_batch)


def m2po_winsorized(tokens: PolicyTokens, settings: M2poWinsorizedConfig) -> ObjectiveTerms:
    """M2PO as in the code of the authors of arXiv:2510.01161: PPO's clip at exp(-+ tau), no dual clip.

    tau is one number for the mini-batch (`winsorizing_log_ratio`); the clip is never tighter than
    1 - clip_low and 1 + clip_high.
    """
    assert tokens.surveyed_L is not None, "m2po_winsorized needs its survey"
    ratio = tokens.log_ratio_L.exp()
    lower = (-tokens.surveyed_L).exp().clamp(max=1 - settings.clip_low)
    upper = tokens.surveyed_L.exp().clamp(min=1 + settings.clip_high)
    return pessimistic_terms(tokens, ratio, lower, upper, dual_L=None)


def winsorizing_log_ratio(mini_batch: MiniBatch, settings: M2poWinsorizedConfig) -> list[Tensor]:
    """tau, the bound on |log ratio|, for every token, computed as in the code of the authors of arXiv:2510.01161.

    The harmful tokens' squares v_1 <= ... <= v_n are capped at one of their own values: at the largest v_k for which
    the capped sum, v_1 + ... + v_k + v_k (n - k), is below n `second_moment`; at 0 if this is true for no v_k. They are
    not capped if their mean is at most `second_moment`.
    """
    harmful = [_harmful(tokens) for tokens in mini_batch.micro_batches]
    squares = gather_selected([tokens.log_ratio_L**2 for tokens in mini_batch.micro_batches], harmful)
    count, total = mini_batch.ranks.sum(torch.stack([torch.ones_like(squares), squares]).sum(1)).tolist()
    tau = MAX_LOG_RATIO  # log-ratios are clamped to this, so it clips nothing
    if total > settings.second_moment * count:
        target = settings.second_moment * count
        edge = boundary(squares, lambda below, part, cap: part + cap * (count - below) < target, mini_batch.ranks)
        if edge is not None:  # None: the same sum, added in another order, rounds to just within the target
            inside = squares[squares < edge.value]
            largest = inside.amax() if len(inside) else squares.new_zeros(())
            tau = float(mini_batch.ranks.max(largest)) ** 0.5
    return [torch.full_like(tokens.log_ratio_L, tau) for tokens in mini_batch.micro_batches]


def _harmful(tokens: PolicyTokens) -> Tensor:
    return tokens.is_trained_L & (tokens.advantages_L * tokens.log_ratio_L > 0)
