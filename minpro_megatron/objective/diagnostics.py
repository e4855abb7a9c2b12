"""Off-policyness and objective statistics of the local slots, in forms that merge exactly over ranks."""

from collections.abc import Mapping, Sequence
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
    """`totals` (sums, or extremes) over `counts` slots, one number for each of `names`. They stay on the device until
    the step's end."""

    names: Sequence[str]
    totals: Tensor
    counts: Tensor
    reduction: Reduction
    only_observed: bool = False  # a bucket is a metric only if it holds anything


@dataclass(frozen=True)
class Statistics:
    """What a micro-batch's local slots amount to."""

    parts: list[Statistic]
    histograms: dict[str, Tensor]  # int64 [NUM_BINS]: log-ratios in the bins of monitor.histograms


def token_statistics(
    tokens: PolicyTokens, terms: ObjectiveTerms, entropies_L: Tensor, others: OtherLogProbs, staleness_L: Tensor
) -> Statistics:
    """The statistics of the trained slots by metric name (see monitor.metrics.METRICS for their meaning)."""
    slots = _TrainedSlots(tokens.is_trained_L)
    log_ratio, weight, prefix_min = tokens.log_ratio_L, terms.weight_L, tokens.prefix_minimum_L
    ratio, weight_square, log_ratio_square = log_ratio.exp(), weight.double() ** 2, log_ratio**2
    log_product = tokens.prefix_log_ratio_L
    log_prefix_min = torch.where(tokens.log_prefix_minimum_L == torch.inf, 0.0, tokens.log_prefix_minimum_L)
    # m_t rho_t stands for rho_1 ... rho_t: what of the product's log is lost, or made up
    log_surrogate = log_prefix_min + log_ratio
    gap = log_surrogate - log_product
    gap_abs = gap.abs()
    mismatch = others.rollout_L - others.behavior_L  # log of (engine / trainer) under the same weights
    mismatch_abs = mismatch.abs()
    means = {
        "policy/entropy": entropies_L,
        # the tokens were drawn from the old policy: estimates of KL(old || current), as kl_estimate's
        "policy/kl_k1": -log_ratio,
        "policy/kl_k2": log_ratio_square / 2,
        "policy/kl_k3": ratio - 1 - log_ratio,
        "ratio/mean": ratio,
        "ratio/square_mean": ratio**2,
        "ratio/log_second_moment": log_ratio_square,
        "prefix_min/mean": prefix_min,
        "prefix_min/below_one": prefix_min < 1,
        "prefix_ratio/log_mean": log_product,
        "prefix_ratio/surrogate_log_mean": log_surrogate,
        "prefix_ratio/gap_abs_mean": gap_abs,
        "objective/weight_mean": weight,
        "objective/weight_square_mean": weight_square,
        "objective/clipped_fraction": terms.clipped_L,
        "objective/masked_fraction": terms.left_out_L,
        "mismatch/log_prob_abs_mean": mismatch_abs,
        "mismatch/kl_k3": kl_estimate(mismatch, torch.zeros_like(mismatch), "k3")[0],
    }
    by_bucket = {
        "prefix_min/mean": prefix_min,
        "prefix_ratio/log": log_product,
        "prefix_ratio/surrogate_log": log_surrogate,
        "prefix_ratio/gap_abs": gap_abs,
        "objective/weight": weight,
        "objective/weight_square": weight_square,
    }
    parts = [
        slots.means(means),
        slots.smallest({"ratio/min": ratio, "prefix_min/min": prefix_min}),
        slots.largest({"ratio/max": ratio, "mismatch/log_prob_abs_max": mismatch_abs}),
        *slots.by_buckets(
            by_bucket,
            {
                "position": (position_bucket(tokens), POSITION_BUCKETS),
                "staleness": (staleness_L, STALENESS_BUCKETS),
            },
        ),
        _place_of_the_minimum(tokens),
    ]
    logs = {"ratio/log": log_ratio, "prefix_min/log": log_prefix_min, "prefix_ratio/gap": gap}
    return Statistics(parts, slots.histograms(logs))


def loss_statistic(summed_value: Tensor, count: int) -> Statistic:
    """The loss: the sum of the local slots' values over this rank's part of the denominator."""
    return Statistic(["objective/loss"], summed_value[None], summed_value.new_full((1,), count), "mean")


def as_metrics(micro_batches: Sequence[Statistics]) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
    """(metrics, histogram counts) of the micro-batches together, with one transfer from the device each; empty for
    none."""
    statistics = [statistic for one in micro_batches for statistic in one.parts]
    if not statistics:
        return {}, {}
    numbers = torch.cat([part.double() for one in statistics for part in (one.totals, one.counts)]).cpu().tolist()
    parts, start = [], 0
    for one in statistics:
        middle, end = start + len(one.names), start + 2 * len(one.names)
        triples = zip(one.names, numbers[start:middle], numbers[middle:end], strict=True)
        parts.append(
            {
                name: Metric(total, count, one.reduction)
                for name, total, count in triples
                if count or not one.only_observed
            }
        )
        start = end
    histograms = {
        name: torch.stack([one.histograms[name] for one in micro_batches]).sum(0).cpu().numpy()
        for name in micro_batches[0].histograms
    }
    return merge(parts), histograms


@dataclass(frozen=True)
class _TrainedSlots:
    mask_L: Tensor

    def means(self, values: Mapping[str, Tensor]) -> Statistic:
        return Statistic(list(values), self._rows(values, 0.0).sum(1), self._counts(values), "mean")

    def smallest(self, values: Mapping[str, Tensor]) -> Statistic:
        return Statistic(list(values), self._rows(values, torch.inf).amin(1), self._counts(values), "min")

    def largest(self, values: Mapping[str, Tensor]) -> Statistic:
        return Statistic(list(values), self._rows(values, -torch.inf).amax(1), self._counts(values), "max")

    def by_buckets(
        self, values: Mapping[str, Tensor], divisions: Mapping[str, tuple[Tensor, Sequence[str]]]
    ) -> list[Statistic]:
        """Means over the slots of each bucket, as `<name>_by_<division>/<bucket>`; a division is each slot's bucket and
        the buckets' names, of which the last holds whatever is beyond."""
        rows = torch.cat([self._rows(values, 0.0), self.mask_L.double()[None]])
        statistics = []
        for division, (bucket_L, buckets) in divisions.items():
            place = bucket_L.clamp(0, len(buckets) - 1)
            sums = rows.new_zeros(len(rows), len(buckets)).index_add_(1, place, rows)
            names = [f"{name}_by_{division}/{bucket}" for name in values for bucket in buckets]
            counts = sums[-1].repeat(len(values))
            statistics.append(Statistic(names, sums[:-1].reshape(-1), counts, "mean", only_observed=True))
        return statistics

    def histograms(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """int64 [NUM_BINS] each; NaN is in no bin."""
        rows = torch.stack([values_L.double() for values_L in values.values()])
        place = torch.floor(torch.asinh(rows / SCALE) / STEP).clamp(-BINS_PER_SIDE, BINS_PER_SIDE - 1) + BINS_PER_SIDE
        place = torch.where(self.mask_L & ~rows.isnan(), place, NUM_BINS).long()
        counts = place.new_zeros(len(rows), NUM_BINS + 1).scatter_add_(1, place, torch.ones_like(place))
        return dict(zip(values, counts[:, :NUM_BINS], strict=True))

    def _rows(self, values: Mapping[str, Tensor], otherwise: float) -> Tensor:
        """float64 [names, L]: the values of the trained slots, and `otherwise` in the others, whatever they hold."""
        rows = torch.stack([values_L.double() for values_L in values.values()])
        return torch.where(self.mask_L, rows, otherwise)

    def _counts(self, values: Mapping[str, Tensor]) -> Tensor:
        return self.mask_L.sum().expand(len(values))


def _place_of_the_minimum(tokens: PolicyTokens) -> Statistic:
    """Where in each response its smallest ratio sits first: 0 the first trained token, 1 the last (or the only one)."""
    is_smallest = tokens.log_ratio_L == tokens.scan.whole(tokens.log_ratio_L, "min")
    is_it = tokens.is_trained_L & is_smallest & (tokens.log_ratio_L < tokens.log_prefix_minimum_L)
    last = (tokens.scan.whole(tokens.mask_L, "sum") - 1).clamp(min=1)
    places = torch.where(is_it, tokens.earlier_L / last, 0.0).sum()
    return Statistic(["ratio/min_position"], places[None], is_it.sum()[None], "mean")
