"""Off-policyness and objective statistics of the local slots, in a form that merges exactly over ranks.

A micro-batch's statistics are one vector: this needs fewer small operations, and one copy to the host for all values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minpro_megatron.metrics.histograms import BINS_PER_SIDE, NUM_BINS, SCALE, STEP
from minpro_megatron.metrics.metric import Metric, Reduction, merge
from minpro_megatron.objective.corrections import OtherLogProbs, kl_estimate
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens, position_bucket

POSITION_BUCKETS = [str(2**b) for b in range(18)]  # named by their first position: 1, 2-3, 4-7, ... 131072 and beyond
STALENESS_BUCKETS = [str(steps) for steps in range(17)]  # the last contains all larger values
DIVISIONS = {"position": POSITION_BUCKETS, "staleness": STALENESS_BUCKETS}

# Means over the trained slots in the order of `_rows`. The first ones are also reported by bucket, under these names.
_BY_BUCKET = {
    "prefix_ratio/log": "prefix_ratio/log_mean",
    "prefix_ratio/surrogate_log": "prefix_ratio/surrogate_log_mean",
    "prefix_ratio/gap_abs": "prefix_ratio/gap_abs_mean",
    "objective/weight": "objective/weight_mean",
    "objective/weight_square": "objective/weight_square_mean",
    "prefix_min/mean": "prefix_min/mean",
}
_MEANS = (
    *_BY_BUCKET.values(), "ratio/mean", "mismatch/log_prob_abs_mean", "ratio/square_mean", "ratio/log_second_moment",
    "policy/entropy", "policy/kl_k1", "policy/kl_k2", "policy/kl_k3", "prefix_min/below_one",
    "objective/clipped_fraction", "objective/masked_fraction", "mismatch/kl_k3",
)  # fmt: skip
_PLACE = "ratio/min_position"  # a mean over the responses' smallest ratios
_SMALLEST = {"prefix_min/mean": "prefix_min/min", "ratio/mean": "ratio/min"}
_LARGEST = {"ratio/mean": "ratio/max", "mismatch/log_prob_abs_mean": "mismatch/log_prob_abs_max"}
_HISTOGRAMS = ("ratio/log", "prefix_min/log", "prefix_ratio/gap")


@dataclass(frozen=True)
class Statistics:
    """The statistics of a micro-batch's local slots. They stay on the device until the end of the mini-batch."""

    numbers: Tensor  # float64, in the order of `_layout`
    histograms: Tensor  # int64 [histograms, NUM_BINS]: logs in the bins of metrics.histograms


class _Entry(NamedTuple):
    """The indices in `Statistics.numbers` of a metric's total (a sum, or an extreme) and of its count."""

    name: str
    total: int
    count: int
    reduction: Reduction
    is_bucket: bool = False  # a bucket is reported only if it is not empty


def token_statistics(
    tokens: PolicyTokens,
    terms: ObjectiveTerms,
    entropies_L: Tensor,
    others: OtherLogProbs,
    staleness_L: Tensor,
    loss: tuple[Tensor, float],
) -> Statistics:
    """The statistics of the trained slots (metrics.metric.METRICS describes them). `loss` is the sum of the local
    slots' values and this rank's part of the denominator."""
    mask, log_ratio = tokens.is_trained_L, tokens.log_ratio_L
    log_prefix_min = torch.where(tokens.log_prefix_minimum_L == torch.inf, 0.0, tokens.log_prefix_minimum_L)
    # m_t rho_t replaces rho_1 ... rho_t; the gap is the difference of their logarithms
    log_surrogate = log_prefix_min + log_ratio
    gap = log_surrogate - tokens.prefix_log_ratio_L
    rows = torch.stack(_rows(tokens, terms, entropies_L, others, log_surrogate, gap))
    trained = torch.where(mask, rows, 0.0)
    smallest, largest = (slice(1 + min(r), 2 + max(r)) for r in (_rows_of(_SMALLEST), _rows_of(_LARGEST)))
    numbers = [
        trained.sum(1),
        torch.where(mask, rows[smallest], torch.inf).amin(1),
        torch.where(mask, rows[largest], -torch.inf).amax(1),
    ]
    for bucket_L, buckets in ((position_bucket(tokens), POSITION_BUCKETS), (staleness_L, STALENESS_BUCKETS)):
        of_buckets = trained.new_zeros(1 + len(_BY_BUCKET), len(buckets))
        place = bucket_L.clamp(0, len(buckets) - 1)
        numbers.append(of_buckets.index_add_(1, place, trained[: len(of_buckets)]).view(-1))
    value, count = loss
    numbers.append(torch.stack([value.double(), value.new_full((), count, dtype=torch.float64)]))
    return Statistics(torch.cat(numbers), _histograms(torch.stack([log_ratio, log_prefix_min, gap]), mask))


def as_metrics(micro_batches: Sequence[Statistics]) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
    """(metrics, histogram counts) of the micro-batches together, with one transfer from the device each; empty for
    none."""
    if not micro_batches:
        return {}, {}
    parts = [
        {
            entry.name: Metric(numbers[entry.total], numbers[entry.count], entry.reduction)
            for entry in _layout()
            if numbers[entry.count] or not entry.is_bucket
        }
        for numbers in torch.stack([one.numbers for one in micro_batches]).cpu().tolist()
    ]
    histograms = torch.stack([one.histograms for one in micro_batches]).sum(0).cpu().numpy()
    return merge(parts), dict(zip(_HISTOGRAMS, histograms, strict=True))


def _rows(
    tokens: PolicyTokens, terms: ObjectiveTerms, entropies_L: Tensor, others: OtherLogProbs, log_surrogate_L: Tensor,
    gap_L: Tensor,
) -> list[Tensor]:  # fmt: skip
    """float64 [L] each: 1 for every slot, the values of _MEANS, and, at the slot of each response's smallest ratio, its
    relative position and 1."""
    log_ratio, weight, prefix_min = tokens.log_ratio_L, terms.weight_L.double(), tokens.prefix_minimum_L
    ratio, log_ratio_square = log_ratio.exp(), log_ratio**2
    mismatch = others.rollout_L - others.behavior_L  # log of (engine / trainer) under the same weights
    is_smallest, place = _position_of_minimum(tokens)
    return [
        torch.ones_like(log_ratio),
        tokens.prefix_log_ratio_L,
        log_surrogate_L,
        gap_L.abs(),
        weight,
        weight**2,
        prefix_min.double(),
        ratio,
        mismatch.abs().double(),
        ratio**2,
        log_ratio_square,
        entropies_L.double(),
        # the tokens were sampled from the old policy: estimates of KL(old || current), as in kl_estimate
        -log_ratio,
        log_ratio_square / 2,
        ratio - 1 - log_ratio,
        (prefix_min < 1).double(),
        terms.clipped_L.double(),
        terms.excluded_L.double(),
        kl_estimate(mismatch, torch.zeros_like(mismatch), "k3")[0].double(),
        place,
        is_smallest.double(),
    ]


def _rows_of(names: dict[str, str]) -> list[int]:
    return [_MEANS.index(name) for name in names]


@cache
def _layout() -> list[_Entry]:
    return list(_places())


def _places() -> Iterator[_Entry]:
    """The entries in the order in which token_statistics writes them."""
    for row, name in enumerate((*_MEANS, _PLACE), start=1):
        yield _Entry(name, row, 0 if name != _PLACE else row + 1, "mean")
    start = len(_MEANS) + 3
    extremes: list[tuple[dict[str, str], Reduction]] = [(_SMALLEST, "min"), (_LARGEST, "max")]
    for names, reduction in extremes:
        for index, name in enumerate(names.values()):
            yield _Entry(name, start + index, 0, reduction)
        start += len(names)
    for division, buckets in DIVISIONS.items():
        for row, name in enumerate(_BY_BUCKET, start=1):
            for index, bucket in enumerate(buckets):
                total = start + row * len(buckets) + index
                yield _Entry(f"{name}_by_{division}/{bucket}", total, start + index, "mean", is_bucket=True)
        start += (1 + len(_BY_BUCKET)) * len(buckets)
    yield _Entry("objective/loss", start, start + 1, "mean")


def _histograms(values_HL: Tensor, mask_L: Tensor) -> Tensor:
    """int64 [H, NUM_BINS]; NaN is not counted."""
    place = torch.floor(torch.asinh(values_HL / SCALE) / STEP).clamp(-BINS_PER_SIDE, BINS_PER_SIDE - 1) + BINS_PER_SIDE
    place = torch.where(mask_L & ~values_HL.isnan(), place, NUM_BINS).long()
    counts = place.new_zeros(len(values_HL), NUM_BINS + 1).scatter_add_(1, place, torch.ones_like(place))
    return counts[:, :NUM_BINS]


def _position_of_minimum(tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
    """(bool [L]: this slot is the first with its response's smallest ratio; float64 [L]: its relative position in the
    response, 0 for the first trained token, 1 for the last or the only one; 0 in other slots)."""
    is_smallest = tokens.log_ratio_L == tokens.log_minimum_L
    is_it = tokens.is_trained_L & is_smallest & (tokens.log_ratio_L < tokens.log_prefix_minimum_L)
    last = (tokens.trained_L - 1).clamp(min=1)
    return is_it, torch.where(is_it, tokens.earlier_L / last, 0.0)
