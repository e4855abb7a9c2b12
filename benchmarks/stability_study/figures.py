"""The study's pictures: a column for each delay, the objectives in two rows, thick lines means over seeds."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.stability_study.analysis import final_accuracy, mean_curve
from benchmarks.stability_study.curves import StoredRun
from benchmarks.stability_study.grid import DELAYS, OBJECTIVES
from minpro_megatron.report.figures import STYLE

WINDOW = 5  # global steps of the running mean in noisy curves
# MinPRO with its controls and relatives, and with the objectives of other papers.
ROWS = (
    ("minpro", "cispo", "scaled_cispo", "shuffled_minpro", "prefix_ratio", "prefix_filter"),
    ("minpro", "grpo", "gspo", "m2po", "ctpo"),
)
COLORS = {
    "minpro": "#dc2626",
    "cispo": "#2563eb",
    "scaled_cispo": "#0891b2",
    "shuffled_minpro": "#d97706",
    "prefix_ratio": "#7c3aed",
    "prefix_filter": "#64748b",
    "grpo": "#2563eb",
    "gspo": "#0f9d76",
    "m2po": "#d97706",
    "ctpo": "#7c3aed",
}

type Curve = tuple[list[int], list[float]]


def write_figures(runs: Sequence[StoredRun], folder: Path) -> None:
    """heldout.png, reward.png, entropy.png, clipped.png and final.png in `folder`."""
    with mpl.rc_context(STYLE | {"font.size": 8}):
        _grid(runs, "held-out accuracy", _heldout).savefig(folder / "heldout.png", dpi=100, metadata=_NO_DATE)
        _grid(runs, "training reward", _smoothed("accuracy")).savefig(folder / "reward.png", dpi=100, metadata=_NO_DATE)
        _grid(runs, "entropy, nats", _smoothed("entropy")).savefig(folder / "entropy.png", dpi=100, metadata=_NO_DATE)
        clipped = _grid(runs, "clipped or left out", _clipped, log_scale=True)
        clipped.savefig(folder / "clipped.png", dpi=100, metadata=_NO_DATE)
        _final(runs).savefig(folder / "final.png", dpi=100, metadata=_NO_DATE)


_NO_DATE: Any = {"Software": None}


def hard_clipped(runs: Sequence[StoredRun]) -> list[float]:
    """By global step: response tokens whose weight was clipped, or that were excluded; the mean over `runs`."""
    return [
        clipped + masked
        for clipped, masked in zip(mean_curve(runs, "clipped"), mean_curve(runs, "masked"), strict=True)
    ]


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Centred, shorter at the ends; values that are not finite are excluded.

    >>> running_mean([0, 3, 6, 9], 3)
    [1.5, 3.0, 6.0, 7.5]
    """
    half, means = window // 2, []
    for place in range(len(values)):
        near = [value for value in values[max(0, place - half) : place + half + 1] if math.isfinite(value)]
        means.append(fmean(near) if near else math.nan)
    return means


def _heldout(runs: Sequence[StoredRun]) -> Curve:
    versions = max((run.versions for run in runs), key=len)
    by_version = [[run.heldout[place] for run in runs if place < len(run.heldout)] for place in range(len(versions))]
    return versions, [fmean(values) for values in by_version]


def _smoothed(column: str) -> Callable[[Sequence[StoredRun]], Curve]:
    def curve(runs: Sequence[StoredRun]) -> Curve:
        values = running_mean(mean_curve(runs, column))
        return list(range(len(values))), values

    return curve


def _clipped(runs: Sequence[StoredRun]) -> Curve:
    values = running_mean(hard_clipped(runs))
    return list(range(len(values))), [max(value, 1e-5) for value in values]


def _grid(
    runs: Sequence[StoredRun], label: str, curve: Callable[[Sequence[StoredRun]], Curve], log_scale: bool = False
) -> Figure:
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ROWS), len(DELAYS), sharex=True, sharey=True)
    for row, objectives in enumerate(ROWS):
        for column, delay in enumerate(DELAYS):
            _panel(axes[row][column], runs, objectives, delay, curve)
            if row == 0:
                axes[row][column].set_title(f"delay {delay}" if delay else "on-policy", fontsize=9)
            if log_scale:
                axes[row][column].set_yscale("log")
        axes[row][0].set_ylabel(label)
        axes[row][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.supxlabel("global step", fontsize=8)
    return figure


def _panel(
    axes: Axes,
    runs: Sequence[StoredRun],
    objectives: Sequence[str],
    delay: int,
    curve: Callable[[Sequence[StoredRun]], Curve],
) -> None:
    for objective in objectives:
        chosen = [run for run in runs if run.key.objective == objective and run.key.delay_steps == delay]
        for run in chosen if len(chosen) > 1 else []:
            axes.plot(*curve([run]), color=COLORS[objective], linewidth=0.5, alpha=0.25)
        if chosen:
            front = 3 if objective == "minpro" else 2
            axes.plot(*curve(chosen), color=COLORS[objective], label=objective, zorder=front)


def _final(runs: Sequence[StoredRun]) -> Figure:
    """Every run's final accuracy as a dot, means as lines."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(DELAYS), sharey=True)
    for axes, delay in zip(panels, DELAYS, strict=True):
        for place, objective in enumerate(OBJECTIVES):
            chosen = [run for run in runs if run.key.objective == objective and run.key.delay_steps == delay]
            found = [final_accuracy(run) for run in chosen]
            if found:
                axes.plot([place] * len(found), found, "o", color=COLORS[objective], markersize=3.5, alpha=0.6)
                axes.plot([place - 0.3, place + 0.3], [fmean(found)] * 2, color=COLORS[objective], linewidth=2)
        axes.set_title(f"delay {delay}" if delay else "on-policy", fontsize=9)
        axes.set_xticks(range(len(OBJECTIVES)), OBJECTIVES, rotation=60, ha="right")
    panels[0].set_ylabel("final held-out accuracy")
    return figure
