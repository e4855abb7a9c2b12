"""Loss functions for one's own training loop: the objectives whose weights are smooth functions of ratios."""

from typing import Unpack

from torch import Tensor

from minpro_megatron.config import objective as config
from minpro_megatron.config.objective import Aggregation
from minpro_megatron.objective.loss_functions.loss_call import LossOptions, loss_function, objective_loss


@loss_function
def sapo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    temperature_positive: float = 1.0, temperature_negative: float = 1.05,
    aggregation: Aggregation = "sequence_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """SAPO, arXiv:2511.20347: -(4 / tau) sigmoid(tau (rho_t - 1)) A_t, where tau is temperature_positive for A_t > 0
    and temperature_negative otherwise."""
    settings = config.SapoConfig(
        temperature_positive=temperature_positive, temperature_negative=temperature_negative, aggregation=aggregation
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def vespo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    power_positive: float = 2.0, decay_positive: float = 3.0, power_negative: float = 3.0, decay_negative: float = 2.0,
    aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """VESPO, arXiv:2602.10693: -W^k exp(lambda (1 - W)) A_t log pi_t, where W is the product of the ratios of the
    sequence and (k, lambda) are (power_positive, decay_positive) for A_t >= 0, (power_negative, decay_negative)
    otherwise."""
    settings = config.VespoConfig(
        power_positive=power_positive,
        decay_positive=decay_positive,
        power_negative=power_negative,
        decay_negative=decay_negative,
        aggregation=aggregation,
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def pnpo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    smallest_weight: float | None = None, largest_weight: float | None = None,
    aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """PNPO, arXiv:2608.01418: -w_t A_t log pi_t, where w_t is the geometric mean of the ratios up to t, without the
    tokens whose w_t is outside smallest_weight .. largest_weight (None: no limit)."""
    settings = config.PnpoConfig(
        smallest_weight=smallest_weight, largest_weight=largest_weight, aggregation=aggregation
    )
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)


@loss_function
def p3o_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
    aggregation: Aggregation = "token_mean",
    **options: Unpack[LossOptions],
) -> Tensor:  # fmt: skip
    """P3O, arXiv:2605.12380: -min(rho_t, e) A_t log pi_t + (1 - e) KL(pi || old), where e is the effective sample size
    of the batch's ratios, (sum rho)^2 / (N sum rho^2), and KL the k3 estimate from the sampled token."""
    settings = config.P3oConfig(aggregation=aggregation)
    return objective_loss(settings, log_probs, old_log_probs, advantages, mask, **options)
