"""Controls for MinPRO: the two attempts that arXiv:2601.22718 reports as failed, and MinPRO with shuffled minima.

The third control, scaled_cispo, is CISPO with another learning rate (`objective.registry`).
"""

import numpy as np
import torch
from torch import Tensor

from minpro_megatron.config.objective import PrefixFilterConfig, PrefixRatioConfig, ShuffledMinproConfig
from minpro_megatron.objective.across_ranks.ranking import quantile
from minpro_megatron.objective.formulas.clipped_weight import clipped_weight_terms
from minpro_megatron.objective.survey import gather_selected, scatter_selected
from minpro_megatron.objective.terms import MAX_LOG_RATIO, MiniBatch, ObjectiveTerms, PolicyTokens, position_bucket


def prefix_ratio(tokens: PolicyTokens, settings: PrefixRatioConfig) -> ObjectiveTerms:
    """weight = clip(rho_1 * ... * rho_t, 1 - clip_low, 1 + clip_high): arXiv:2601.22718's first failed attempt."""
    ratio = tokens.prefix_log_ratio_L.clamp(max=MAX_LOG_RATIO).exp()
    return clipped_weight_terms(tokens, ratio, settings)


def prefix_filter(tokens: PolicyTokens, settings: PrefixFilterConfig) -> ObjectiveTerms:
    """CISPO without the tokens that `small_prefix_ratios` marks: arXiv:2601.22718's second failed attempt."""
    assert tokens.surveyed_L is not None, "prefix_filter needs its survey"
    return clipped_weight_terms(tokens, tokens.log_ratio_L.exp(), settings).without(tokens.surveyed_L > 0)


def small_prefix_ratios(mini_batch: MiniBatch, settings: PrefixFilterConfig) -> list[Tensor]:
    """1 for each token whose product of ratios up to it is strictly below the mini-batch's `quantile` of the products.

    The quantile interpolates linearly, as numpy.quantile does; tokens equal to it are kept. It is computed on the
    logarithms of the products, which have the same order and do not underflow.
    """
    trained = [tokens.is_trained_L for tokens in mini_batch.micro_batches]
    sums = gather_selected([tokens.prefix_log_ratio_L for tokens in mini_batch.micro_batches], trained)
    return scatter_selected(sums < quantile(sums, settings.quantile, mini_batch.ranks), trained, mini_batch)


def shuffled_minpro(tokens: PolicyTokens, settings: ShuffledMinproConfig) -> ObjectiveTerms:
    """MinPRO with the prefix minima that `shuffled_prefix_minima` assigned."""
    assert tokens.surveyed_L is not None, "shuffled_minpro needs its survey"
    return clipped_weight_terms(tokens, tokens.surveyed_L * tokens.log_ratio_L.exp(), settings)


def shuffled_prefix_minima(mini_batch: MiniBatch, settings: ShuffledMinproConfig) -> list[Tensor]:
    """For each token the prefix minimum of a random token of the mini-batch from the same position bucket.

    Buckets contain positions 1, 2-3, 4-7, 8-15, ... of trained tokens. The minima are permuted within a bucket, so that
    their distribution by position does not change. As a control experiment it may change the minimum of every token.
    """
    trained = [tokens.is_trained_L for tokens in mini_batch.micro_batches]
    minima = gather_selected([tokens.prefix_minimum_L for tokens in mini_batch.micro_batches], trained)
    buckets = gather_selected([position_bucket(tokens) for tokens in mini_batch.micro_batches], trained)
    ids = gather_selected([tokens.ids_L for tokens in mini_batch.micro_batches], trained)
    rows = torch.stack([ids.double(), buckets.double(), minima.double()], dim=1)
    rows = mini_batch.ranks.gather(rows.reshape(-1)).view(-1, 3).cpu().numpy()
    rows = rows[np.argsort(rows[:, 0])]  # ordered by token: the shuffle must not depend on the ranks of the tokens
    random, shuffled = np.random.default_rng(mini_batch.seed), rows[:, 2].copy()
    for bucket in np.unique(rows[:, 1]):
        members = np.flatnonzero(rows[:, 1] == bucket)
        shuffled[members] = rows[random.permutation(members), 2]
    mine = shuffled[np.searchsorted(rows[:, 0], ids.cpu().numpy())]
    return scatter_selected(torch.from_numpy(mine).to(minima), trained, mini_batch)
