"""Which runs the study has, in their order, and the rule that chooses each objective's learning rate.

protocol.md beside this file gives the reasons, and lists what was changed after the first run of the selection.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks.stability_study.trial import TrialKey

MAIN = ("minpro", "cispo", "scaled_cispo", "shuffled_minpro")
OTHERS = ("grpo", "gspo", "m2po", "ctpo", "cppo")
OBJECTIVES = (*MAIN, *OTHERS)
DELAYS = (0, 4, 16)  # global steps
LONGEST = DELAYS[-1]
SEEDS = tuple(range(5))
MORE_SEEDS = tuple(range(10))  # of MAIN at the longest delay

SELECTION_SEEDS = (100, 101)
RATES = (6.25e-5, 1.25e-4, 2.5e-4, 5e-4)  # a factor of two from one to the next
COMMON_RATE = 5e-4  # of MAIN in the runs that compare them at equal rates
COMMON_STAGE = "study_common_rate"
EXTENSIONS = 2  # further rates at most, if the best one is at an end of the tried ones


def selection_keys(objective: str, rates: Sequence[float]) -> list[TrialKey]:
    return [TrialKey("selection", objective, LONGEST, seed, rate) for rate in sorted(rates) for seed in SELECTION_SEEDS]


def next_rates(means: Mapping[float, float]) -> tuple[float, ...]:
    """The rates to try for an objective, of which `means` has those already tried with their primary metric.

    First RATES; then, while the best is the smallest or the largest of all, the one beyond it, EXTENSIONS times at
    most. Empty: there is nothing more to try.

    >>> next_rates({6.25e-5: 0.2, 1.25e-4: 0.6})
    (0.00025, 0.0005)
    >>> next_rates({6.25e-5: 0.2, 1.25e-4: 0.6, 2.5e-4: 0.8, 5e-4: 0.9})
    (0.001,)
    >>> next_rates({6.25e-5: 0.2, 1.25e-4: 0.6, 2.5e-4: 0.8, 5e-4: 0.1})
    ()
    """
    if untried := tuple(rate for rate in RATES if rate not in means):
        return untried
    smallest, largest, best = min(means), max(means), chosen_rate(means)
    if len(means) == len(RATES) + EXTENSIONS or smallest < best < largest:
        return ()
    return (best / 2,) if best == smallest else (best * 2,)


def chosen_rate(means: Mapping[float, float]) -> float:
    """The rate with the highest primary metric; of equal ones the smallest."""
    return min(means, key=lambda rate: (-means[rate], rate))


def study_keys(rates: Mapping[str, float]) -> list[TrialKey]:
    """Every run of the study, seed by seed, and then those with COMMON_RATE; `rates` has the learning rate of each
    objective."""
    keys = []
    for seed in MORE_SEEDS:
        for delay in reversed(DELAYS):
            for objective in OBJECTIVES:
                if seed in SEEDS or (delay == LONGEST and objective in MAIN):
                    keys.append(TrialKey("study", objective, delay, seed, rates[objective]))
    return keys + [
        TrialKey(COMMON_STAGE, objective, LONGEST, seed, COMMON_RATE) for seed in MORE_SEEDS for objective in MAIN
    ]


NUM_STUDY_RUNS = len(study_keys(dict.fromkeys(OBJECTIVES, 0.0)))


def means_by_rate(values: Mapping[TrialKey, float]) -> dict[float, float]:
    """The means over SELECTION_SEEDS of one objective's selection runs, for the rates that have them all."""
    rates = sorted({key.learning_rate for key in values})
    by_rate = {rate: [value for key, value in values.items() if key.learning_rate == rate] for rate in rates}
    return {rate: fmean(found) for rate, found in by_rate.items() if len(found) == len(SELECTION_SEEDS)}
