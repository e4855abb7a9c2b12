"""Statistics of the report: final and peak accuracy, collapse, paired differences. Pure arithmetic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

from benchmarks.stability_study.curves import StoredRun

FINAL_EVALUATIONS = 3  # the final accuracy is the mean of this number of last evaluations
COLLAPSE_SHARE = 0.5
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error (NaN for one seed)."""

    value: float
    error: float
    count: int

    @property
    def half_width(self) -> float:
        """The half width of the interval of Student's t with `count` - 1 degrees of freedom."""
        if self.count < 2:
            return math.nan
        return float(student.ppf((1 + CONFIDENCE) / 2, self.count - 1)) * self.error

    @property
    def excludes_zero(self) -> bool:
        return self.count > 1 and abs(self.value) > self.half_width


def mean_over_seeds(values: Sequence[float]) -> Mean:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(fmean(values), error, len(values))


def final_accuracy(run: StoredRun) -> float:
    """The mean of the last held-out evaluations; 0 if the trainer ended the run early."""
    return 0.0 if run.given_up else fmean(run.heldout[-FINAL_EVALUATIONS:])


def peak_accuracy(run: StoredRun) -> float:
    return max(run.heldout)


def collapse_version(versions: Sequence[int], accuracies: Sequence[float]) -> int | None:
    """The first evaluated version from which on the accuracy stays below half of its previous maximum; None if there is
    none. A dip that recovers is not a collapse.

    >>> collapse_version([0, 5, 10, 15, 20], [0.2, 0.8, 0.3, 0.5, 0.1])
    20
    """
    for place in range(1, len(accuracies)):
        limit = COLLAPSE_SHARE * max(accuracies[:place])
        if all(accuracy < limit for accuracy in accuracies[place:]):
            return versions[place]
    return None


def collapse(run: StoredRun) -> int | None:
    """In global steps: `collapse_version`, or the step at which the trainer ended the run early."""
    found = collapse_version(run.versions, run.heldout)
    if found is None and run.given_up:
        return len(run)
    return found


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Mean:
    """The mean of `ours` - `theirs` over the seeds that both have, by seed. Raises ValueError if there are none."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(ours)} and {sorted(theirs)}")
    return mean_over_seeds([ours[seed] - theirs[seed] for seed in seeds])


def mean_curve(runs: Sequence[StoredRun], column: str) -> list[float]:
    """By global step, over the runs that reached it; values that are not finite are excluded."""
    longest = max(len(run) for run in runs)
    curve = []
    for step in range(longest):
        values = [run.columns[column][step] for run in runs if step < len(run)]
        finite = [value for value in values if math.isfinite(value)]
        curve.append(fmean(finite) if finite else math.nan)
    return curve


def mean_of_column(run: StoredRun, column: str) -> float:
    """Over the run's global steps."""
    finite = [value for value in run.columns[column] if math.isfinite(value)]
    return fmean(finite) if finite else math.nan
