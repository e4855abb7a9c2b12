"""Off-policyness and objective statistics of the local slots, as tensors that merge by sum, max or min."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minpro_megatron.monitor.metrics import Reduction
from minpro_megatron.objective.corrections import OtherLogProbs
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


@dataclass(frozen=True)
class Statistic:
    """`total` (a sum, or an extreme) over `count` slots; both stay on the device until the step's end."""

    total: Tensor
    count: Tensor
    reduction: Reduction


def token_statistics(
    tokens: PolicyTokens, terms: ObjectiveTerms, entropies_L: Tensor, others: OtherLogProbs
) -> dict[str, Statistic]:
    """The statistics of the trained slots by metric name (see monitor.metrics.METRICS for their meaning)."""
    mask = tokens.is_trained_L
    count = mask.sum()
    ratio, prefix_min = tokens.log_ratio_L.exp(), tokens.prefix_minimum_L
    mismatch = others.rollout_L - others.behavior_L  # log of (engine / trainer) under the same weights

    def mean(values: Tensor) -> Statistic:
        return Statistic(torch.where(mask, values.float(), 0.0).sum(), count, "mean")

    def smallest(values: Tensor) -> Statistic:
        return Statistic(torch.where(mask, values, torch.inf).amin(), count, "min")

    def largest(values: Tensor) -> Statistic:
        return Statistic(torch.where(mask, values, -torch.inf).amax(), count, "max")

    return {
        "policy/entropy": mean(entropies_L),
        "ratio/mean": mean(ratio),
        "ratio/min": smallest(ratio),
        "ratio/max": largest(ratio),
        "prefix_min/mean": mean(prefix_min),
        "prefix_min/min": smallest(prefix_min),
        "prefix_min/below_one": mean(prefix_min < 1),
        "objective/weight_mean": mean(terms.weight_L),
        "objective/clipped_fraction": mean(terms.clipped_L),
        "mismatch/log_prob_abs_mean": mean(mismatch.abs()),
        "mismatch/log_prob_abs_max": largest(mismatch.abs()),
        # k3 estimate of KL(engine || trainer), non-negative for every token: exp(-x) - 1 + x
        "mismatch/kl_k3": mean((-mismatch).exp() - 1 + mismatch),
    }


def loss_statistic(summed_value: Tensor, count: int) -> dict[str, Statistic]:
    """The loss: the sum of the local slots' values over this rank's part of the denominator."""
    return {"objective/loss": Statistic(summed_value, summed_value.new_tensor(count), "mean")}
