"""What the protocol asks of the record: comparisons with their corrections, collapse and mechanism. Pure arithmetic."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.stability_study.grid import COMMON_STAGE, DELAYS, LONGEST, MAIN, OBJECTIVES
from benchmarks.stability_study.measures import Difference, collapse_version, difference, holm, paired
from benchmarks.stability_study.record import StoredTrial, heldout_curve, primary_metric, versions
from benchmarks.stability_study.trial import COMPARED, TrialKey

RELEVANT = 0.03  # the smallest advantage in held-out accuracy that would matter
PRIMARY = ("cispo", LONGEST)
CONTROLS = (("scaled_cispo", LONGEST), ("shuffled_minpro", LONGEST))
REST = tuple(
    (objective, delay)
    for delay in reversed(DELAYS)
    for objective in OBJECTIVES
    if objective != "minpro" and (objective, delay) not in (PRIMARY, *CONTROLS)
)
COMMON = "common rate"
FAMILIES = {
    "primary": (PRIMARY,),
    "controls": CONTROLS,
    COMMON: tuple((objective, LONGEST) for objective in MAIN if objective != "minpro"),
    "others": REST,
}

type Record = Mapping[TrialKey, StoredTrial]


@dataclass(frozen=True)
class Comparison:
    """MinPRO less another objective at a delay, in the primary metric."""

    family: str
    objective: str
    delay: int
    difference: Difference
    adjusted_p: float  # by Holm's method, within the family
    interval: tuple[float, float]  # with 95 % for the whole family


def by_seed(
    record: Record,
    objective: str,
    delay: int,
    value: Callable[[StoredTrial], float] = primary_metric,
    stage: str = "study",
) -> dict[int, float]:
    """A number of each run of the study with that objective and delay, by seed. `stage`: "study", with the objective's
    own learning rate, or COMMON_STAGE."""
    return {
        key.seed: value(trial)
        for key, trial in record.items()
        if (key.stage, key.objective, key.delay) == (stage, objective, delay)
    }


def comparisons(record: Record) -> list[Comparison]:
    """All comparisons of the protocol, family by family. Raises ValueError if the record lacks a cell."""
    found = []
    for family, cells in FAMILIES.items():
        stage = COMMON_STAGE if family == COMMON else "study"
        differences = [
            paired(by_seed(record, "minpro", delay, stage=stage), by_seed(record, objective, delay, stage=stage))
            for objective, delay in cells
        ]
        adjusted = holm([one.p_value for one in differences])
        for (objective, delay), one, p_value in zip(cells, differences, adjusted, strict=True):
            found.append(Comparison(family, objective, delay, one, p_value, one.interval(len(cells))))
    return found


def verdict(low: float, high: float) -> str:
    """What an interval of MinPRO's advantage says, by the protocol's rule. One without width comes from equal
    differences, of two objectives that collapsed with every seed for instance; how they would vary is not known.

    >>> verdict(0.01, 0.09), verdict(-0.01, 0.02), verdict(-0.02, 0.06)
    ('for', 'against: no relevant advantage', 'undecided')
    """
    if low == high:
        return "undecided: no difference varies"
    if low > 0:
        return "for"
    if high < 0:
        return "against: worse"
    return "against: no relevant advantage" if high < RELEVANT else "undecided"


def collapse(trial: StoredTrial) -> int | None:
    """The version at which the run collapsed; a run without a finite gradient collapsed there at the latest."""
    found = collapse_version(versions(trial), heldout_curve(trial))
    return found if found is not None or trial.ended_at is None else trial.ended_at


def steps_to_collapse(trial: StoredTrial) -> float:
    """Global steps until the collapse, all of the run's if there was none."""
    found = collapse(trial)
    return float(trial.num_global_steps if found is None else found)


def relative_variance(trial: StoredTrial, objective: str) -> float:
    """The logarithm of (trace of the gradient's covariance / squared norm of its expectation) of `objective`, both
    averaged over the updates at which the run compared gradients; NaN if one of the averages is not above 0.

    The expectation of a gradient's squared norm is that of the expected gradient plus the variance, which is therefore
    subtracted. What is left is 0 or less at some updates, so that the averages are divided, not the numbers of each
    update. The first update is left out: the policies are the same there, and with them the gradients of COMPARED,
    which are far larger than later.
    """
    later = trial.compared[1:]
    variance = sum(one[f"{objective}/variance"] for one in later)
    squared_mean = sum(one[f"{objective}/squared_norm"] for one in later) - variance
    return math.log(variance / squared_mean) if variance > 0 and squared_mean > 0 else math.nan


def variance_ratio(record: Record, visited_by: str) -> Difference | None:
    """Log of MinPRO's relative variance over CISPO's at the same weights and on the same responses, of the runs of
    `visited_by` at the longest delay; over seeds. None if a run has no estimate: without it, the others would be those
    that happen to show a large gradient."""
    cispo, minpro = COMPARED
    logs = by_seed(
        record, visited_by, LONGEST, lambda trial: relative_variance(trial, minpro) - relative_variance(trial, cispo)
    )
    return difference(list(logs.values())) if all(map(math.isfinite, logs.values())) else None


def mean_by_position(trials: Sequence[StoredTrial], name: str) -> dict[int, float]:
    """A statistic by the first position of its bucket, the mean over runs."""
    prefix = f"{name}_by_position/"
    positions = sorted({int(one.removeprefix(prefix)) for trial in trials for one in trial.means if prefix in one})
    return {place: fmean(trial.means[f"{prefix}{place}"] for trial in trials) for place in positions}


def mean_curve(trials: Sequence[StoredTrial]) -> list[float]:
    """Held-out accuracy by evaluated version, the mean over runs."""
    return [fmean(values) for values in zip(*(heldout_curve(trial) for trial in trials), strict=True)]
