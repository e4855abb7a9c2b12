"""A run's history without discarded steps, and the figures by which runs are compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from minpro_megatron.monitor.history import Entry, read_history
from minpro_megatron.report.figures import Series, series

# A run has collapsed at the step from which on its accuracy stays below this share of its best accuracy.
COLLAPSED_SHARE = 0.5
_WINDOW = 10  # global steps over which the accuracy of training rollouts is averaged


def valid_history(run_dir: Path) -> list[Entry]:
    """The run's entries, ordered by step. If a run went back to an earlier checkpoint and has not yet reached the
    same step again, its file still contains later steps that were discarded: entries of a step are excluded if an
    earlier step was written after them."""
    kept, newest = [], -math.inf
    for entry in read_history(run_dir):
        if entry.time >= newest:
            kept.append(entry)
        if entry.is_global_step:
            newest = max(newest, entry.time)
    return kept


@dataclass(frozen=True, slots=True)
class Figures:
    """The results of a run; accuracies are shares, and unknown values are None."""

    num_steps: int
    held_out: float | None  # pass@1 of the last evaluation
    best_held_out: tuple[float, int] | None  # the best one, and its policy version
    held_out_reward: float | None  # mean reward of the last evaluation
    reward: float | None  # of training rollouts, mean of the last steps
    accuracy: float | None  # of training rollouts, mean of the last steps
    best_accuracy: tuple[float, int] | None  # the largest such mean, and the last of its steps
    collapsed_at: int | None  # the step from which on the accuracy stays below half of its best
    mean_staleness: float | None
    largest_staleness: float | None
    step_s: float | None  # mean
    total_s: float | None  # of all steps


def figures_of(history: Sequence[Entry]) -> Figures:
    held_out, accuracy = series(history, "eval/pass_at_1"), series(history, "reward/accuracy")
    means, rewards = _running_means(accuracy), _running_means(series(history, "reward/mean"))
    held_out_reward = series(history, "eval/mean_reward")
    stale, stalest = _finite(series(history, "staleness/mean")), _finite(series(history, "staleness/max"))
    seconds = _finite(series(history, "time/step_s"))
    return Figures(
        num_steps=sum(entry.is_global_step for entry in history),
        held_out=held_out.values[-1] if held_out else None,
        best_held_out=_best(held_out),
        held_out_reward=held_out_reward.values[-1] if held_out_reward else None,
        reward=rewards.values[-1] if rewards else None,
        accuracy=means.values[-1] if means else None,
        best_accuracy=_best(means),
        collapsed_at=_collapsed_at(means),
        mean_staleness=fmean(stale) if stale else None,
        largest_staleness=max(stalest, default=None),
        step_s=fmean(seconds) if seconds else None,
        total_s=math.fsum(seconds) if seconds else None,
    )


def _finite(data: Series) -> list[float]:
    return [value for value in data.values if math.isfinite(value)]


def _running_means(data: Series) -> Series:
    """At each step the mean over this step and up to nine steps before it, never over later steps."""
    pairs = [(step, value) for step, value in zip(data.steps, data.values, strict=True) if math.isfinite(value)]
    values = [value for _, value in pairs]
    means = [fmean(values[max(0, place + 1 - _WINDOW) : place + 1]) for place in range(len(values))]
    return Series([step for step, _ in pairs], means)


def _best(data: Series) -> tuple[float, int] | None:
    pairs = [(value, step) for step, value in zip(data.steps, data.values, strict=True) if math.isfinite(value)]
    return max(pairs, key=lambda pair: (pair[0], -pair[1]), default=None)


def _collapsed_at(means: Series) -> int | None:
    found, best = None, 0.0
    for step, value in zip(means.steps, means.values, strict=True):
        best = max(best, value)
        if value >= COLLAPSED_SHARE * best:
            found = None
        elif found is None:
            found = step
    return found
