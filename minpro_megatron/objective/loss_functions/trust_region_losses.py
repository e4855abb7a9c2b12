"""Loss functions for one's own training loop: the objectives that keep the tokens inside a trust region."""

from typing import Literal, Unpack

from torch import Tensor

from minpro_megatron.config import objective as config
from minpro_megatron.config.objective import Aggregation, Divergence
from minpro_megatron.objective.loss_functions.loss_call import LossOptions, loss_function, objective_loss


@loss_function
def dppo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    divergence: Divergence = "total_variation", threshold_low: float = 0.2, threshold_high: float = 0.2,
    largest_ratio: float | None = 20.0, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """DPPO, arXiv:2602.04879: -min(rho_t, largest_ratio) A_t log pi_t without the tokens that move away from the
    sampling policy and whose divergence from it, estimated from the sampled token, exceeds threshold_low (A_t < 0) or
    threshold_high (A_t > 0)."""
    settings = config.DppoConfig(
        divergence=divergence,
        threshold_low=threshold_low,
        threshold_high=threshold_high,
        largest_ratio=largest_ratio,
        aggregation=aggregation,
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def cppo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    divergence: Divergence = "total_variation", threshold: float = 0.15, budget: float = 0.02,
    smallest_weight: float = 0.8, horizon: int | None = None, largest_ratio: float | None = None,
    aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """CPPO, arXiv:2606.10968: -rho_t A_t log pi_t (with the gradient of -rho_t A_t) without the tokens that move away
    from the sampling policy and whose weighted divergence exceeds threshold, or less than it where the tokens before t
    of the same sequence have diverged by more than budget on average."""
    settings = config.CppoConfig(
        divergence=divergence,
        threshold=threshold,
        budget=budget,
        smallest_weight=smallest_weight,
        horizon=horizon,
        largest_ratio=largest_ratio,
        aggregation=aggregation,
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def trm_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    divergence: Divergence = "kl", max_divergence: float | None = 0.05, mean_divergence: float | None = None,
    largest_ratio: float | None = None, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """TRM, arXiv:2512.23075: -rho_t A_t log pi_t (with the gradient of -rho_t A_t) without the sequences in which the
    largest divergence of a token, estimated from the sampled token, exceeds max_divergence, or their mean
    mean_divergence."""
    settings = config.TrmConfig(
        divergence=divergence,
        max_divergence=max_divergence,
        mean_divergence=mean_divergence,
        largest_ratio=largest_ratio,
        aggregation=aggregation,
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def sat_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    ratio: Literal["token", "sequence"] = "token", clip_low: float = 0.2, clip_high: float = 0.2,
    quantile: float = 0.9, aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """SAT, arXiv:2607.18722: -min(rho_t A_t, clip(rho_t) A_t), where rho_t is the ratio of the token or the geometric
    mean of the sequence's, and the bounds 1 - clip_low and 1 + clip_high move toward 1 for tokens whose |log rho_t|
    exceeds its `quantile` over the batch."""
    settings = config.SatConfig(
        ratio=ratio, clip_low=clip_low, clip_high=clip_high, quantile=quantile, aggregation=aggregation
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)
