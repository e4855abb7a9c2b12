"""Off-policyness and objective statistics of the local slots, in forms that merge exactly over ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minpro_megatron.monitor.histograms import BINS_PER_SIDE, NUM_BINS, SCALE, STEP
from minpro_megatron.monitor.metrics import Metric, Reduction, merge
from minpro_megatron.objective.corrections import OtherLogProbs, kl_estimate
from minpro_megatron.objective.surveys import position_bucket
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens

POSITION_BUCKETS = [str(2**b) for b in range(18)]  # named by their first position: 1, 2-3, 4-7, ... 131072 and beyond
STALENESS_BUCKETS = [str(steps) for steps in range(17)]  # the last holds whatever is staler


@dataclass(frozen=True)
class Statistic:
    """`total` (a sum, or an extreme) over `count` slots; both stay on the device until the step's end.

    Scalars, or one number for each of `buckets`.
    """

    total: Tensor
    count: Tensor
    reduction: Reduction
    buckets: Sequence[str] | None = None


@dataclass(frozen=True)
class Statistics:
    """What a micro-batch's local slots amount to."""

    by_name: dict[str, Statistic]
    histograms: dict[str, Tensor]  # int64 [NUM_BINS]: log-ratios in the bins of monitor.histograms


def token_statistics(
    tokens: PolicyTokens, terms: ObjectiveTerms, entropies_L: Tensor, others: OtherLogProbs, staleness_L: Tensor
) -> Statistics:
    """The statistics of the trained slots by metric name (see monitor.metrics.METRICS for their meaning)."""
    slots = _TrainedSlots(tokens.is_trained_L)
    ratio, prefix_min, weight = tokens.log_ratio_L.exp(), tokens.prefix_minimum_L, terms.weight_L
    mismatch = others.rollout_L - others.behavior_L  # log of (engine / trainer) under the same weights
    named = {
        "policy/entropy": slots.mean(entropies_L),
        "ratio/mean": slots.mean(ratio),
        "ratio/min": slots.smallest(ratio),
        "ratio/max": slots.largest(ratio),
        "ratio/square_mean": slots.mean(ratio.double() ** 2),
        "ratio/log_second_moment": slots.mean(tokens.log_ratio_L.double() ** 2),
        "ratio/min_position": _place_of_the_minimum(tokens),
        "prefix_min/mean": slots.mean(prefix_min),
        "prefix_min/min": slots.smallest(prefix_min),
        "prefix_min/below_one": slots.mean(prefix_min < 1),
        "objective/weight_mean": slots.mean(weight),
        "objective/weight_square_mean": slots.mean(weight.double() ** 2),
        "objective/clipped_fraction": slots.mean(terms.clipped_L),
        "objective/masked_fraction": slots.mean(terms.left_out_L),
        "objective/weight_by_position": slots.by_bucket(weight, position_bucket(tokens), POSITION_BUCKETS),
        "objective/weight_by_staleness": slots.by_bucket(weight, staleness_L, STALENESS_BUCKETS),
        "mismatch/log_prob_abs_mean": slots.mean(mismatch.abs()),
        "mismatch/log_prob_abs_max": slots.largest(mismatch.abs()),
        "mismatch/kl_k3": slots.mean(kl_estimate(mismatch, torch.zeros_like(mismatch), "k3")[0]),
    }
    # the tokens were drawn from the old policy: estimates of KL(old || current)
    for estimator in ("k1", "k2", "k3"):
        value, _ = kl_estimate(-tokens.log_ratio_L, torch.zeros_like(tokens.log_ratio_L), estimator)
        named[f"policy/kl_{estimator}"] = slots.mean(value)
    log_prefix_min = tokens.prefix_minimum_L.log()
    return Statistics(
        named, {"ratio": slots.histogram(tokens.log_ratio_L), "prefix_min": slots.histogram(log_prefix_min)}
    )


def loss_statistic(summed_value: Tensor, count: int) -> dict[str, Statistic]:
    """The loss: the sum of the local slots' values over this rank's part of the denominator."""
    return {"objective/loss": Statistic(summed_value, summed_value.new_full((), count), "mean")}


def as_metrics(micro_batches: Sequence[Statistics]) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
    """(metrics, histogram counts) of the micro-batches together, with one transfer from the device each; empty for
    none. A bucket is a metric of its own, name/bucket, if it holds anything."""
    statistics = [(name, s) for one in micro_batches for name, s in one.by_name.items()]
    if not statistics:
        return {}, {}
    numbers = [value.double().reshape(-1) for _, s in statistics for value in (s.total, s.count)]
    flat = iter(torch.cat(numbers).cpu().split([len(value) for value in numbers]))
    parts = []
    for name, s in statistics:
        totals, counts = next(flat).tolist(), next(flat).tolist()
        names = [name] if s.buckets is None else [f"{name}/{bucket}" for bucket in s.buckets]
        parts.append(
            {
                full: Metric(total, count, s.reduction)
                for full, total, count in zip(names, totals, counts, strict=True)
                if count or s.buckets is None
            }
        )
    histograms = {
        name: torch.stack([one.histograms[name] for one in micro_batches]).sum(0).cpu().numpy()
        for name in micro_batches[0].histograms
    }
    return merge(parts), histograms


@dataclass(frozen=True)
class _TrainedSlots:
    mask_L: Tensor

    def mean(self, values_L: Tensor) -> Statistic:
        return Statistic(self._where(values_L, 0.0).sum(), self.mask_L.sum(), "mean")

    def smallest(self, values_L: Tensor) -> Statistic:
        return Statistic(torch.where(self.mask_L, values_L, torch.inf).amin(), self.mask_L.sum(), "min")

    def largest(self, values_L: Tensor) -> Statistic:
        return Statistic(torch.where(self.mask_L, values_L, -torch.inf).amax(), self.mask_L.sum(), "max")

    def by_bucket(self, values_L: Tensor, bucket_L: Tensor, buckets: Sequence[str]) -> Statistic:
        place = bucket_L.clamp(0, len(buckets) - 1)
        empty = torch.zeros(len(buckets), dtype=torch.float64, device=values_L.device)
        totals = empty.index_add(0, place, self._where(values_L, 0.0))
        counts = empty.index_add(0, place, self.mask_L.double())
        return Statistic(totals, counts, "mean", buckets)

    def histogram(self, values_L: Tensor) -> Tensor:
        """int64 [NUM_BINS]; NaN is in no bin."""
        place = torch.floor(torch.asinh(values_L.double() / SCALE) / STEP).clamp(-BINS_PER_SIDE, BINS_PER_SIDE - 1)
        counted = self.mask_L & ~values_L.isnan()
        place = torch.where(counted, place + BINS_PER_SIDE, NUM_BINS).long()
        ones = torch.ones_like(place)
        return ones.new_zeros(NUM_BINS + 1).index_add_(0, place, ones)[:NUM_BINS]

    def _where(self, values_L: Tensor, otherwise: float) -> Tensor:
        return torch.where(self.mask_L, values_L.double(), otherwise)


def _place_of_the_minimum(tokens: PolicyTokens) -> Statistic:
    """Where in each response its smallest ratio sits first: 0 the first trained token, 1 the last (or the only one)."""
    smallest = tokens.scan.whole(tokens.log_ratio_L, "min")
    here = torch.where(tokens.log_ratio_L == smallest, tokens.earlier_L, torch.inf)
    first = tokens.scan.whole(here, "min")
    is_it = tokens.is_trained_L & (tokens.earlier_L == first)
    last = (tokens.scan.whole(tokens.mask_L, "sum") - 1).clamp(min=1)
    return Statistic(torch.where(is_it, tokens.earlier_L / last, 0.0).sum(), is_it.sum(), "mean")
