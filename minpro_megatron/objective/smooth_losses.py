"""Loss functions for one's own training loop: the objectives whose weights are smooth functions of ratios."""

from typing import Unpack

from torch import Tensor

from minpro_megatron.config import objective as config
from minpro_megatron.config.objective import Aggregation
from minpro_megatron.objective.loss_call import LossOptions, loss_function, objective_loss


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
