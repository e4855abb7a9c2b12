"""What the protocol measures: primary metric, collapse, paired differences, corrections. Pure arithmetic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

CONFIDENCE = 0.95
COLLAPSE_SHARE = 0.5


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its two-sided p-value against 0 (Student's t, count - 1 degrees of
    freedom). With one pair, or with equal differences, the error says nothing and p is NaN."""

    mean: float
    error: float  # standard error
    count: int

    @property
    def p_value(self) -> float:
        if self.count < 2 or self.error == 0:
            return math.nan
        return float(2 * student.sf(abs(self.mean) / self.error, self.count - 1))

    def interval(self, comparisons: int = 1) -> tuple[float, float]:
        """The interval with CONFIDENCE for all of `comparisons` together (Bonferroni)."""
        if self.count < 2:
            return -math.inf, math.inf
        half = float(student.isf((1 - CONFIDENCE) / (2 * comparisons), self.count - 1)) * self.error
        return self.mean - half, self.mean + half


def difference(values: Sequence[float]) -> Difference:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(fmean(values), error, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """`ours` less `theirs`, seed by seed, over the seeds that both have. Raises ValueError if there is none."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(ours)} and {sorted(theirs)}")
    return difference([ours[seed] - theirs[seed] for seed in seeds])


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number by Holm's step-down method (Holm 1979), in the given order. NaN, a test
    that could not be made, counts as a comparison and stays NaN.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda place: (math.isnan(p_values[place]), p_values[place]))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, place in enumerate(order):
        if not math.isnan(p_values[place]):
            largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
            adjusted[place] = largest
    return adjusted


def last_third(versions: Sequence[int], accuracies: Sequence[float]) -> float:
    """The primary metric: the mean held-out accuracy of the versions after two thirds of the run.

    >>> last_third([0, 5, 10, 15], [0.1, 0.2, 0.6, 0.8])
    0.8
    """
    return fmean(
        accuracy for version, accuracy in zip(versions, accuracies, strict=True) if 3 * version > 2 * versions[-1]
    )


def collapse_version(versions: Sequence[int], accuracies: Sequence[float]) -> int | None:
    """The first version from which on the accuracy stays below half of its largest value before; None if there is none.
    A dip that recovers is no collapse.

    >>> collapse_version([0, 5, 10, 15, 20], [0.2, 0.8, 0.3, 0.5, 0.1])
    20
    """
    for place in range(1, len(accuracies)):
        limit = COLLAPSE_SHARE * max(accuracies[:place])
        if all(accuracy < limit for accuracy in accuracies[place:]):
            return versions[place]
    return None
