"""Off-policyness and objective statistics of the local slots, in a form that merges exactly over ranks.

A micro-batch's statistics are one vector: this needs fewer small operations, and one copy to the host for all values.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minpro_megatron.metrics.histograms import BINS_PER_SIDE, NUM_BINS, SCALE, STEP
from minpro_megatron.metrics.metric import Metric, Reduction, merge
from minpro_megatron.objective.corrections import OtherLogProbs, kl_estimate
from minpro_megatron.objective.terms import MAX_LOG_RATIO, ObjectiveTerms, PolicyTokens, position_bucket

POSITION_BUCKETS = [str(2**b) for b in range(18)]  # named by their first position: 1, 2-3, 4-7, ... 131072 and beyond
STALENESS_BUCKETS = [str(steps) for steps in range(17)]  # the last contains all larger values
DIVISIONS = {"position": POSITION_BUCKETS, "staleness": STALENESS_BUCKETS}


class _Measure(NamedTuple):
    """A metric: the reduction of a row of values, one per slot, over the trained slots."""

    name: str
    row: str  # a key of `_rows`
    reduction: Reduction
    observations: str = "trained"  # the row whose sum is the number of observations


_MEASURES = (
    _Measure("prefix_ratio/log_mean", "prefix_log_ratio", "mean"),
    _Measure("prefix_ratio/surrogate_log_mean", "log_surrogate", "mean"),
    _Measure("prefix_ratio/gap_abs_mean", "gap_abs", "mean"),
    _Measure("objective/weight_mean", "weight", "mean"),
    _Measure("objective/weight_square_mean", "weight_square", "mean"),
    _Measure("objective/clipped_fraction", "clipped", "mean"),
    _Measure("objective/masked_fraction", "excluded", "mean"),
    _Measure("prefix_min/mean", "prefix_min", "mean"),
    _Measure("prefix_min/min", "prefix_min", "min"),
    _Measure("prefix_min/below_one", "prefix_min_below_one", "mean"),
    _Measure("ratio/mean", "ratio", "mean"),
    _Measure("ratio/min", "ratio", "min"),
    _Measure("ratio/max", "ratio", "max"),
    _Measure("ratio/square_mean", "ratio_square", "mean"),
    _Measure("ratio/sequence_mean", "sequence_ratio", "mean", observations="last"),
    _Measure("ratio/sequence_square_mean", "sequence_ratio_square", "mean", observations="last"),
    _Measure("ratio/log_second_moment", "log_ratio_square", "mean"),
    _Measure("ratio/min_position", "min_position", "mean", observations="has_min_ratio"),
    _Measure("mismatch/log_prob_abs_mean", "mismatch_abs", "mean"),
    _Measure("mismatch/log_prob_abs_max", "mismatch_abs", "max"),
    _Measure("mismatch/kl_k3", "mismatch_kl_k3", "mean"),
    _Measure("policy/entropy", "entropy", "mean"),
    _Measure("policy/kl_k1", "kl_k1", "mean"),
    _Measure("policy/kl_k2", "kl_k2", "mean"),
    _Measure("policy/kl_k3", "kl_k3", "mean"),
)
# Also reported as means by bucket, under these names.
_BY_BUCKET = {
    "prefix_ratio/log": "prefix_log_ratio",
    "prefix_ratio/surrogate_log": "log_surrogate",
    "prefix_ratio/gap_abs": "gap_abs",
    "objective/weight": "weight",
    "objective/weight_square": "weight_square",
    "prefix_min/mean": "prefix_min",
}
_HISTOGRAMS = ("ratio/log", "prefix_min/log", "prefix_ratio/gap")


def _rows_reduced_by(reduction: Reduction) -> tuple[str, ...]:
    return tuple(dict.fromkeys(measure.row for measure in _MEASURES if measure.reduction == reduction))


_IN_BUCKETS = ("trained", *_BY_BUCKET.values())
# The parts of the vector in order, each with its rows.
_PARTS: dict[str, tuple[str, ...]] = {
    # the rows of the buckets come first: token_statistics takes them as one slice
    "sum": tuple(dict.fromkeys((*_IN_BUCKETS, *_rows_reduced_by("mean"), *(one.observations for one in _MEASURES)))),
    "min": _rows_reduced_by("min"),
    "max": _rows_reduced_by("max"),
    **dict.fromkeys(DIVISIONS, _IN_BUCKETS),
    "loss": ("value", "denominator"),
}


@dataclass(frozen=True)
class Statistics:
    """The statistics of a micro-batch's local slots. They stay on the device until the end of the mini-batch."""

    numbers: Tensor  # float64, at the indices of `_indices`
    histograms: Tensor  # int64 [histograms, NUM_BINS]: logs in the bins of metrics.histograms


class _Entry(NamedTuple):
    """The indices in `Statistics.numbers` of a metric's total (a sum, or an extreme) and number of observations."""

    name: str
    total: int
    observations: int
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
    """The statistics of the trained slots (metrics.declared describes them). `loss` is the sum of the local
    slots' values and this rank's part of the denominator."""
    mask, log_ratio = tokens.is_trained_L, tokens.log_ratio_L
    log_prefix_min = torch.where(tokens.log_prefix_minimum_L == torch.inf, 0.0, tokens.log_prefix_minimum_L)
    # m_t rho_t replaces rho_1 ... rho_t; the gap is the difference of their logarithms
    log_surrogate = log_prefix_min + log_ratio
    gap = log_surrogate - tokens.prefix_log_ratio_L
    rows = _rows(tokens, terms, entropies_L, others, log_surrogate, gap)

    def masked(part: str, value: float) -> Tensor:
        return torch.where(mask, torch.stack([rows[name] for name in _PARTS[part]]), value)

    trained = masked("sum", 0.0)
    parts = {
        "sum": trained.sum(1),
        "min": masked("min", torch.inf).amin(1),
        "max": masked("max", -torch.inf).amax(1),
        "loss": torch.stack([loss[0].double(), loss[0].new_full((), loss[1], dtype=torch.float64)]),
    }
    for division, bucket_L in (("position", position_bucket(tokens)), ("staleness", staleness_L)):
        place = bucket_L.clamp(0, len(DIVISIONS[division]) - 1)
        of_buckets = trained.new_zeros(len(_IN_BUCKETS), len(DIVISIONS[division]))
        parts[division] = of_buckets.index_add_(1, place, trained[: len(of_buckets)])
    numbers = torch.cat([parts[part].view(-1) for part in _PARTS])
    return Statistics(numbers, _histograms(torch.stack([log_ratio, log_prefix_min, gap]), mask))


def as_metrics(micro_batches: Sequence[Statistics]) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
    """(metrics, histogram counts) of the micro-batches together, with one transfer from the device each; empty for
    none."""
    if not micro_batches:
        return {}, {}
    parts = [
        {
            entry.name: Metric(numbers[entry.total], numbers[entry.observations], entry.reduction)
            for entry in _layout()
            if numbers[entry.observations] or not entry.is_bucket
        }
        for numbers in torch.stack([one.numbers for one in micro_batches]).cpu().tolist()
    ]
    histograms = torch.stack([one.histograms for one in micro_batches]).sum(0).cpu().numpy()
    return merge(parts), dict(zip(_HISTOGRAMS, histograms, strict=True))


def without_comparisons(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Those of the metrics that compare no policies and have a meaning without ratios."""
    return {name: metric for name, metric in metrics.items() if name in ("objective/loss", "policy/entropy")}


def _rows(
    tokens: PolicyTokens, terms: ObjectiveTerms, entropies_L: Tensor, others: OtherLogProbs, log_surrogate_L: Tensor,
    gap_L: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """The values that are reduced, by name, float64 [L] each."""
    log_ratio, weight, prefix_min = tokens.log_ratio_L, terms.weight_L.double(), tokens.prefix_minimum_L
    ratio, log_ratio_square = log_ratio.exp(), log_ratio**2
    mismatch = others.rollout_L - others.behavior_L  # log of (engine / trainer) under the same weights
    has_min_ratio, min_position = _position_of_minimum(tokens)
    # a sequence is counted at its last trained token, where the product of the ratios so far is that of all
    last = (tokens.is_trained_L & (tokens.earlier_L + 1 == tokens.trained_L)).double()
    sequence_ratio = tokens.prefix_log_ratio_L.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * last
    return {
        "trained": torch.ones_like(log_ratio),
        "prefix_log_ratio": tokens.prefix_log_ratio_L,
        "log_surrogate": log_surrogate_L,
        "gap_abs": gap_L.abs(),
        "weight": weight,
        "weight_square": weight**2,
        "clipped": terms.clipped_L.double(),
        "excluded": terms.excluded_L.double(),
        "prefix_min": prefix_min.double(),
        "prefix_min_below_one": (prefix_min < 1).double(),
        "ratio": ratio,
        "ratio_square": ratio**2,
        "log_ratio_square": log_ratio_square,
        "last": last,
        "sequence_ratio": sequence_ratio,
        "sequence_ratio_square": sequence_ratio**2,
        "has_min_ratio": has_min_ratio.double(),
        "min_position": min_position,
        "mismatch_abs": mismatch.abs().double(),
        "mismatch_kl_k3": kl_estimate(mismatch, torch.zeros_like(mismatch), "k3")[0].double(),
        "entropy": entropies_L.double(),
        # the tokens were sampled from the old policy: estimates of KL(old || current), as in kl_estimate
        "kl_k1": -log_ratio,
        "kl_k2": log_ratio_square / 2,
        "kl_k3": ratio - 1 - log_ratio,
    }


@cache
def _indices() -> dict[tuple[str, str, int], int]:
    """The index in `Statistics.numbers` of (part, row, bucket); bucket 0 in the parts without buckets."""
    places = [
        (part, row, bucket)
        for part, rows in _PARTS.items()
        for row in rows
        for bucket in range(len(DIVISIONS[part]) if part in DIVISIONS else 1)
    ]
    return {place: index for index, place in enumerate(places)}


@cache
def _layout() -> list[_Entry]:
    return list(_entries())


def _entries() -> Iterator[_Entry]:
    index = _indices()
    for measure in _MEASURES:
        part = "sum" if measure.reduction == "mean" else measure.reduction
        total, count = index[part, measure.row, 0], index["sum", measure.observations, 0]
        yield _Entry(measure.name, total, count, measure.reduction)
    for division, buckets in DIVISIONS.items():
        for name, row in _BY_BUCKET.items():
            for place, bucket in enumerate(buckets):
                total, count = index[division, row, place], index[division, "trained", place]
                yield _Entry(f"{name}_by_{division}/{bucket}", total, count, "mean", is_bucket=True)
    yield _Entry("objective/loss", index["loss", "value", 0], index["loss", "denominator", 0], "mean")


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
