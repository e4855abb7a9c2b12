"""What some objectives must know of the whole optimizer mini-batch before its gradient can be computed.

A survey runs after a forward-only pass over the mini-batch under the current weights, on every rank that holds
tokens, and says one number for each of the rank's own tokens, which the objective then finds in `surveyed_L`. The
selections are exact over all ranks and micro-batches (`objective.ranking`); only histograms are exchanged. A token
whose ratio is NaN is never among those to leave out: it shows in the loss. No trained token at all is no error.

The extra pass is paid for by these objectives alone, in every update: one forward on top of forward and backward,
so about a third more computation (a quarter more where activations are recomputed). It cannot be saved by using the
behavior log-probs: the selection depends on the current weights, which each update changes.
"""

import numpy as np
import torch
from torch import Tensor

from minpro_megatron.config.objective import (
    M2poConfig,
    M2poWinsorizedConfig,
    PrefixFilterConfig,
    ShuffledMinproConfig,
)
from minpro_megatron.objective.ranking import boundary, quantile, smallest
from minpro_megatron.objective.terms import MiniBatch, PolicyTokens

NO_BOUND = 20.0  # log-ratios are clamped to this: a larger bound clips nothing


def large_second_moments(mini_batch: MiniBatch, settings: M2poConfig) -> list[Tensor]:
    """1 for each token that M2PO leaves out: arXiv:2510.01161, Algorithm 1.

    Harmful tokens are those that push further away from the old policy: A > 0 with ratio > 1, or A < 0 with ratio < 1.
    Of them the ones with the largest squared log-ratio are left out, as few as make the mean square of the remaining
    harmful ones at most `second_moment`. Of equal squares, the tokens that come first in the mini-batch stay.
    """
    harmful = [_harmful(tokens) for tokens in mini_batch.micro_batches]
    squares = _collect([tokens.log_ratio_L**2 for tokens in mini_batch.micro_batches], harmful)
    ids = _collect([tokens.ids_L for tokens in mini_batch.micro_batches], harmful)
    limit = settings.second_moment
    edge = boundary(squares, lambda count, total, edge: total <= limit * count, mini_batch.ranks)
    if edge is None:
        return [torch.zeros_like(tokens.log_ratio_L) for tokens in mini_batch.micro_batches]
    # of the tokens with exactly the edge's square, as many as still fit: total + n edge <= limit (count + n)
    room = (limit * edge.count_below - edge.total_below) / (edge.value - limit) if edge.value > limit else 0.0
    kept = smallest(squares, ids, edge.count_below + int(room), mini_batch.ranks)
    return _spread(~kept, harmful, mini_batch)


def winsorizing_log_ratio(mini_batch: MiniBatch, settings: M2poWinsorizedConfig) -> list[Tensor]:
    """tau, the bound on |log ratio|, for every token: as the code of arXiv:2510.01161's authors finds it.

    The harmful tokens' squares v_1 <= ... <= v_n are capped at one of their own values: at the largest v_k for which
    the capped sum, v_1 + ... + v_k + v_k (n - k), is below n `second_moment`; at 0 if that holds for none; not at all
    if their plain mean is at most `second_moment`.
    """
    harmful = [_harmful(tokens) for tokens in mini_batch.micro_batches]
    squares = _collect([tokens.log_ratio_L**2 for tokens in mini_batch.micro_batches], harmful)
    count, total = mini_batch.ranks.sum(torch.stack([torch.ones_like(squares), squares]).sum(1)).tolist()
    tau = NO_BOUND
    if total > settings.second_moment * count:
        target = settings.second_moment * count
        edge = boundary(squares, lambda below, part, cap: part + cap * (count - below) < target, mini_batch.ranks)
        if edge is not None:  # None: the same sum, added up in another order, is just not beyond the target
            inside = squares[squares < edge.value]
            largest = inside.amax() if len(inside) else squares.new_zeros(())
            tau = float(mini_batch.ranks.max(largest)) ** 0.5
    return [torch.full_like(tokens.log_ratio_L, tau) for tokens in mini_batch.micro_batches]


def small_prefix_ratios(mini_batch: MiniBatch, settings: PrefixFilterConfig) -> list[Tensor]:
    """1 for each token whose product of ratios up to it is strictly below the mini-batch's `quantile` of them.

    The quantile interpolates linearly, as numpy.quantile does; tokens equal to it stay. It is taken of the products'
    logarithms, which order the tokens in the same way and do not underflow.
    """
    trained = [tokens.is_trained_L for tokens in mini_batch.micro_batches]
    sums = _collect([tokens.prefix_log_ratio_L for tokens in mini_batch.micro_batches], trained)
    return _spread(sums < quantile(sums, settings.quantile, mini_batch.ranks), trained, mini_batch)


def shuffled_prefix_minima(mini_batch: MiniBatch, settings: ShuffledMinproConfig) -> list[Tensor]:
    """For each token the prefix minimum of a random token of the mini-batch from the same position bucket.

    Buckets hold positions 1, 2-3, 4-7, 8-15, ... of trained tokens; within one the minima are permuted, so that their
    distribution by position stays what it was. As a control experiment it may exchange a number for every token.
    """
    trained = [tokens.is_trained_L for tokens in mini_batch.micro_batches]
    minima = _collect([tokens.prefix_minimum_L for tokens in mini_batch.micro_batches], trained)
    buckets = _collect([position_bucket(tokens) for tokens in mini_batch.micro_batches], trained)
    ids = _collect([tokens.ids_L for tokens in mini_batch.micro_batches], trained)
    rows = torch.stack([ids.double(), buckets.double(), minima.double()], dim=1)
    rows = mini_batch.ranks.gather(rows.reshape(-1)).view(-1, 3).cpu().numpy()
    rows = rows[np.argsort(rows[:, 0])]  # the tokens' own order: the shuffle must not depend on who held them
    random, dealt = np.random.default_rng(mini_batch.seed), rows[:, 2].copy()
    for bucket in np.unique(rows[:, 1]):
        members = np.flatnonzero(rows[:, 1] == bucket)
        dealt[members] = rows[random.permutation(members), 2]
    mine = dealt[np.searchsorted(rows[:, 0], ids.cpu().numpy())]
    return _spread(torch.from_numpy(mine).to(minima), trained, mini_batch)


def position_bucket(tokens: PolicyTokens) -> Tensor:
    """int64 [L]: b for the trained tokens 2^b to 2^(b+1) - 1 of their sequence, counted from 1."""
    return torch.log2(tokens.earlier_L + 1.5).long()  # + 1/2: no rounding can put 2^b below b


def _harmful(tokens: PolicyTokens) -> Tensor:
    return tokens.is_trained_L & (tokens.advantages_L * tokens.log_ratio_L > 0)


def _collect(values: list[Tensor], where: list[Tensor]) -> Tensor:
    return torch.cat([value[chosen] for value, chosen in zip(values, where, strict=True)])


def _spread(found: Tensor, where: list[Tensor], mini_batch: MiniBatch) -> list[Tensor]:
    """The inverse of `_collect`: each micro-batch's slots, 0 where not chosen."""
    parts = iter(found.split([int(chosen.sum()) for chosen in where]))
    result = []
    for tokens, chosen in zip(mini_batch.micro_batches, where, strict=True):
        spread = torch.zeros_like(tokens.log_ratio_L)
        spread[chosen] = next(parts).to(spread.dtype)
        result.append(spread)
    return result
