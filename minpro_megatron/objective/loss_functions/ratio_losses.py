"""Loss functions for one's own training loop: MinPRO and the objectives that clip a ratio; docs/python_api.md describes
their use. Every function computes with the same code as a run of this project: `objective.registry`.
"""

from typing import Unpack

from torch import Tensor

from minpro_megatron.config import objective as config
from minpro_megatron.config.objective import Aggregation
from minpro_megatron.objective.loss_functions.loss_call import LossOptions, loss_function, objective_loss


@loss_function
def minpro_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_low: float = 1.0, clip_high: float = 4.0, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """MinPRO, arXiv:2601.22718: -clip(m_t rho_t, 1 - clip_low, 1 + clip_high) A_t log pi_t, where m_t is the smallest
    importance ratio among the trained tokens before t of the same sequence (1 for the first)."""
    settings = config.MinproConfig(clip_low=clip_low, clip_high=clip_high, aggregation=aggregation)
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def cispo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_low: float = 1.0, clip_high: float = 4.0, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """CISPO, arXiv:2506.13585: -clip(rho_t, 1 - clip_low, 1 + clip_high) A_t log pi_t."""
    settings = config.CispoConfig(clip_low=clip_low, clip_high=clip_high, aggregation=aggregation)
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def grpo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 10.0, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """GRPO's token loss, arXiv:2402.03300, with DAPO's asymmetric clip (arXiv:2503.14476) and a dual clip: PPO's clip
    of rho_t to 1 - clip_low .. 1 + clip_high, and of the objective to at least dual_clip A_t for A_t < 0."""
    settings = config.GrpoConfig(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, aggregation=aggregation)
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def gspo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_low: float = 2e-3, clip_high: float = 2e-3, aggregation: Aggregation = "sequence_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """GSPO, arXiv:2507.18071: PPO's clip of the geometric mean of a sequence's importance ratios."""
    settings = config.GspoConfig(clip_low=clip_low, clip_high=clip_high, aggregation=aggregation)
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def m2po_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    second_moment: float = 0.04, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """M2PO, arXiv:2510.01161, Algorithm 1: -rho_t A_t without the harmful tokens with the largest squared log-ratios,
    of which the fewest are excluded for which the mean square of the others is at most second_moment. The tokens are
    chosen among those of this call."""
    settings = config.M2poConfig(second_moment=second_moment, aggregation=aggregation)
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def m2po_winsorized_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    second_moment: float = 0.04, clip_low: float = 0.3, clip_high: float = 0.5,
    aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """M2PO as in its authors' code: PPO's clip of rho_t to exp(-tau) .. exp(tau), never tighter than 1 - clip_low ..
    1 + clip_high. tau follows from second_moment and the tokens of this call."""
    settings = config.M2poWinsorizedConfig(
        second_moment=second_moment, clip_low=clip_low, clip_high=clip_high, aggregation=aggregation
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def ctpo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    log_clip_low: float = 0.025, log_clip_high: float = 0.05, log_dual_clip: float = 0.05,
    position_exponent: float = 0.5, log_clamp: float | None = None, aggregation: Aggregation = "sequence_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """CTPO, arXiv:2605.07331: PPO's clip of the product of the ratios up to t, with bounds exp(-log_clip_low t^p) and
    exp(log_clip_high t^p), for A_t < 0 also exp(log_dual_clip t^p), where p is position_exponent."""
    settings = config.CtpoConfig(
        log_clip_low=log_clip_low,
        log_clip_high=log_clip_high,
        log_dual_clip=log_dual_clip,
        position_exponent=position_exponent,
        log_clamp=log_clamp,
        aggregation=aggregation,
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def ctpo_geomean_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    log_clip_low: float = 0.025, log_clip_high: float = 0.05, log_dual_clip: float = 0.05,
    position_exponent: float = -0.5, log_clamp: float | None = None, aggregation: Aggregation = "sequence_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """CTPO as a variant in its authors' code: PPO's clip of the geometric mean of the ratios up to t, with bounds that
    shrink with the position."""
    settings = config.CtpoGeomeanConfig(
        log_clip_low=log_clip_low,
        log_clip_high=log_clip_high,
        log_dual_clip=log_dual_clip,
        position_exponent=position_exponent,
        log_clamp=log_clamp,
        aggregation=aggregation,
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def prefix_ratio_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_low: float = 1.0, clip_high: float = 4.0, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """The first attempt that arXiv:2601.22718 reports as failed: like MinPRO, with the clipped product of the ratios up
    to t as the weight."""
    settings = config.PrefixRatioConfig(clip_low=clip_low, clip_high=clip_high, aggregation=aggregation)
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def prefix_filter_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    quantile: float = 0.01, clip_low: float = 1.0, clip_high: float = 4.0, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """The second attempt that arXiv:2601.22718 reports as failed: CISPO without the tokens whose product of ratios is
    below the `quantile` of the products of this call."""
    settings = config.PrefixFilterConfig(
        quantile=quantile, clip_low=clip_low, clip_high=clip_high, aggregation=aggregation
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def scaled_cispo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_low: float = 1.0, clip_high: float = 4.0, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """CISPO for a control experiment: the caller multiplies the learning rate of the update by the mean prefix minimum,
    metrics["prefix_min/mean"]. The loss itself is that of cispo_loss."""
    settings = config.ScaledCispoConfig(clip_low=clip_low, clip_high=clip_high, aggregation=aggregation)
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def shuffled_minpro_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    seed: int, clip_low: float = 1.0, clip_high: float = 4.0, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """MinPRO for a control experiment: the prefix minima are permuted at random among the tokens of this call at
    similar positions. Give a different `seed` for every update, the same on all ranks."""
    settings = config.ShuffledMinproConfig(clip_low=clip_low, clip_high=clip_high, aggregation=aggregation)
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, seed=seed, **options)
