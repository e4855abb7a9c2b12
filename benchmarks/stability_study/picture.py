"""The study's picture: held-out accuracy against global steps, a column for each delay."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.stability_study.analysis import Record, mean_curve
from benchmarks.stability_study.grid import DELAYS, MAIN, OTHERS
from benchmarks.stability_study.record import StoredTrial, heldout_curve, versions
from minpro_megatron.report.figures import BLUE, GREEN, ORANGE, PURPLE, RED, STYLE, TEAL

ROWS = (MAIN, ("minpro", *OTHERS))
COLORS = {
    "minpro": RED, "cispo": BLUE, "scaled_cispo": TEAL, "shuffled_minpro": ORANGE, "grpo": BLUE, "gspo": GREEN,
    "m2po": ORANGE, "ctpo": PURPLE, "cppo": TEAL,
}  # fmt: skip
_NO_DATE: Any = {"Software": None}


def write_picture(record: Record, path: Path) -> None:
    """Means over seeds as lines, with a band of one standard error; every objective has the rate chosen for it."""
    with mpl.rc_context(STYLE | {"font.size": 8}):
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(ROWS), len(DELAYS), sharex=True, sharey=True)
        for row, objectives in enumerate(ROWS):
            for column, delay in enumerate(DELAYS):
                for objective in objectives:
                    wanted = "study", objective, delay
                    chosen = [t for k, t in record.items() if (k.stage, k.objective, k.delay) == wanted]
                    if chosen:
                        _curve(axes[row][column], objective, chosen)
                if row == 0:
                    axes[row][column].set_title(f"delay {delay}" if delay else "on-policy", fontsize=9)
            axes[row][0].set_ylabel("held-out accuracy")
            axes[row][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.supxlabel("global step", fontsize=8)
        figure.savefig(path, dpi=110, metadata=_NO_DATE)


def _curve(axes: Axes, objective: str, trials: Sequence[StoredTrial]) -> None:
    steps, means = versions(trials[0]), mean_curve(trials)
    axes.plot(steps, means, color=COLORS[objective], label=objective, zorder=3 if objective == "minpro" else 2)
    if len(trials) > 1:
        by_version = zip(*(heldout_curve(trial) for trial in trials), strict=True)
        errors = [stdev(values) / math.sqrt(len(trials)) for values in by_version]
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(steps, low, high, color=COLORS[objective], alpha=0.15, linewidth=0)
