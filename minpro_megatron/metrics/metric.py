"""Metrics that merge exactly.

A mean over ranks or micro-batches of different sizes is only correct if sum and count are merged separately, so a
`Metric` holds both; only `values` divides.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["mean", "sum", "max", "min"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A partial result of one name: `total` over `count` observations, to be merged by `reduction`.

    For `mean` and `sum` the total is a sum; for `max` and `min` it is the extreme value. A count of 0 means
    that nothing was observed: such a metric does not change a merge and has no value.
    """

    total: float
    count: float
    reduction: Reduction

    @property
    def value(self) -> float:
        """total / count for a mean, else the total; NaN if nothing was observed."""
        if self.count == 0:
            return math.nan
        return self.total / self.count if self.reduction == "mean" else self.total


def mean(total: float, count: float) -> Metric:
    """A mean, given as the sum of the observations and their number.

    >>> parts = [{"response/length_mean": mean(30, 3)}, {"response/length_mean": mean(70, 1)}]
    >>> merge(parts)["response/length_mean"].value
    25.0
    """
    return Metric(total, count, "mean")


def total(value: float) -> Metric:
    """A quantity that adds up over ranks and micro-batches."""
    return Metric(value, 1, "sum")


def largest(value: float) -> Metric:
    """A maximum."""
    return Metric(value, 1, "max")


def smallest(value: float) -> Metric:
    """A minimum."""
    return Metric(value, 1, "min")


def merge(parts: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """One metric per name over all `parts`; a name that only some parts have is merged over these parts.

    Sums are correctly rounded (`math.fsum`), so the order of the parts does not change the result. A NaN
    anywhere stays visible, whatever the reduction. Raises ValueError if two parts give a name different
    reductions.
    """
    collected: dict[str, list[Metric]] = {}
    for part in parts:
        for name, metric in part.items():
            collected.setdefault(name, []).append(metric)
    return {name: _merge_one(name, metrics) for name, metrics in collected.items()}


def _merge_one(name: str, metrics: list[Metric]) -> Metric:
    if len(metrics) == 1:
        return metrics[0]
    reductions = {metric.reduction for metric in metrics}
    if len(reductions) > 1:
        raise ValueError(f"metric {name!r}: cannot merge reductions {' and '.join(sorted(reductions))}")
    # a part of a mean may contribute to the sum and not to the count, which another part then contributes
    observed = [metric for metric in metrics if metric.count != 0 or metric.reduction == "mean"]
    if not observed:
        return metrics[0]
    combine = _COMBINE[metrics[0].reduction]
    combined = combine([metric.total for metric in observed])
    return Metric(combined, math.fsum(metric.count for metric in observed), metrics[0].reduction)


def _extreme(choose: Callable[[Iterable[float]], float]) -> Callable[[Sequence[float]], float]:
    def pick(numbers: Sequence[float]) -> float:
        # Whether max() and min() return a NaN depends on its position; a NaN must never be lost.
        return math.nan if any(math.isnan(number) for number in numbers) else choose(numbers)

    return pick


def _exact_sum(numbers: Sequence[float]) -> float:
    # fsum raises on inf - inf and on intermediate overflow; a diverged run must still log its metrics.
    if all(math.isfinite(number) for number in numbers):
        try:
            return math.fsum(numbers)
        except OverflowError:
            pass
    return sum(numbers)


_COMBINE: dict[Reduction, Callable[[Sequence[float]], float]] = {
    "mean": _exact_sum,
    "sum": _exact_sum,
    "max": _extreme(max),
    "min": _extreme(min),
}


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The number of each metric; metrics without observations are excluded."""
    return {name: metric.value for name, metric in metrics.items() if metric.count != 0}
