"""The report's charts: each turns a run's history into an SVG picture, if the history has its numbers."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minpro_megatron.monitor.history import Entry

_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#2563eb", "#d97706", "#0f9d76", "#7c3aed", "#94a3b8"
STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": "#475569",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef2f7",
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "minpro-megatron",  # the same run gives the same file
}
_PHASES = {
    "time/wait_for_batch_s": ("wait for rollouts", _GREY),
    "time/train_s": ("train", _BLUE),
    "time/score_s": ("score", _GREEN),
    "time/publish_s": ("publish", _ORANGE),
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with its heading and a sentence on how to read it."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Series:
    """The values of one name over the steps that have it."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return any(math.isfinite(value) for value in self.values)


def series(history: Sequence[Entry], name: str) -> Series:
    entries = [entry for entry in history if name in entry.metrics]
    return Series([entry.step for entry in entries], [entry.metrics[name] for entry in entries])


def charts(history: Sequence[Entry]) -> list[Chart]:
    """Every chart that the history has numbers for, in reading order."""
    made = []
    with mpl.rc_context(STYLE):
        for title, caption, draw in _CHARTS:
            figure = Figure(figsize=(5.4, 2.7), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot()
            if draw(axes, history):
                axes.set_xlabel("global step")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                made.append(Chart(title, caption, _svg(figure)))
    return made


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()


def smooth(values: Sequence[float]) -> list[float]:
    """A centred running mean over about a twentieth of the run; values that are not finite are left out."""
    half = len(values) // 40
    smoothed = []
    for index in range(len(values)):
        near = [value for value in values[max(index - half, 0) : index + half + 1] if math.isfinite(value)]
        smoothed.append(sum(near) / len(near) if near else math.nan)
    return smoothed


def _line(axes: Axes, data: Series, color: str, label: str, *, smoothed: bool = False) -> None:
    if not data:
        return
    if smoothed and len(data.values) >= 40:
        axes.plot(data.steps, data.values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(data.steps, smooth(data.values), color=color, label=label)
    else:
        axes.plot(data.steps, data.values, color=color, label=label, marker="." if len(data.steps) < 3 else "")


def _legend(axes: Axes) -> None:
    """Above the picture, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(
            handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=5, columnspacing=1.2,
            handlelength=1.2, borderaxespad=0.2,
        )  # fmt: skip


def _log_scale_if_wide(axes: Axes, data: Series) -> None:
    """A logarithmic axis where the values span more than a factor of 30, else a linear one from 0."""
    positive = [value for value in data.values if math.isfinite(value) and value > 0]
    if positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.set_ylim(bottom=0)


def _accuracy(axes: Axes, history: Sequence[Entry]) -> bool:
    accuracy, reward = series(history, "reward/accuracy"), series(history, "reward/mean")
    evaluated, errors = series(history, "eval/pass_at_1"), series(history, "eval/standard_error")
    if accuracy:
        _line(axes, accuracy, _BLUE, "accuracy of training rollouts", smoothed=True)
    else:
        _line(axes, reward, _BLUE, "mean reward of training rollouts", smoothed=True)
    if evaluated:
        by_version = dict(zip(errors.steps, errors.values, strict=True))
        spread = [by_version.get(step, 0.0) for step in evaluated.steps]
        axes.errorbar(
            evaluated.steps,
            evaluated.values,
            spread,
            fmt="o",
            color=_ORANGE,
            capsize=3,
            label="held-out pass@1",
        )
    if accuracy or evaluated:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)
    _legend(axes)
    return bool(accuracy or reward or evaluated)


def _entropy(axes: Axes, history: Sequence[Entry]) -> bool:
    entropy = series(history, "policy/entropy")
    _line(axes, entropy, _PURPLE, "entropy", smoothed=True)
    axes.set_ylabel("nats")
    axes.set_ylim(bottom=0)
    return bool(entropy)


def _ratio(axes: Axes, history: Sequence[Entry]) -> bool:
    average = series(history, "ratio/mean")
    low, high = series(history, "ratio/min"), series(history, "ratio/max")
    if low and high and low.steps == high.steps:
        axes.fill_between(low.steps, low.values, high.values, color=_BLUE, alpha=0.12, label="min to max", linewidth=0)
    _line(axes, average, _BLUE, "mean")
    axes.axhline(1.0, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    _legend(axes)
    return bool(average)


def _prefix_min(axes: Axes, history: Sequence[Entry]) -> bool:
    average, low = series(history, "prefix_min/mean"), series(history, "prefix_min/min")
    _line(axes, average, _GREEN, "mean")
    _line(axes, low, _GREY, "smallest")
    axes.axhline(1.0, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    _legend(axes)
    return bool(average or low)


def _token_shares(axes: Axes, history: Sequence[Entry]) -> bool:
    clipped, below = series(history, "objective/clipped_fraction"), series(history, "prefix_min/below_one")
    _line(axes, below, _GREEN, "prefix minimum below 1")
    _line(axes, clipped, _ORANGE, "weight clipped")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    _legend(axes)
    return bool(clipped or below)


def _grad_norm(axes: Axes, history: Sequence[Entry]) -> bool:
    norm = series(history, "optimizer/grad_norm")
    _line(axes, norm, _BLUE, "gradient norm", smoothed=True)
    _log_scale_if_wide(axes, norm)
    return bool(norm)


def _mismatch(axes: Axes, history: Sequence[Entry]) -> bool:
    average = series(history, "mismatch/log_prob_abs_mean")
    high = series(history, "mismatch/log_prob_abs_max")
    divergence = series(history, "mismatch/kl_k3")
    _line(axes, high, _GREY, "largest difference")
    _line(axes, average, _BLUE, "mean difference")
    _line(axes, divergence, _ORANGE, "KL (k3)")
    axes.set_ylabel("nats")
    axes.set_yscale("log", nonpositive="mask")
    _legend(axes)
    return bool(average or high or divergence)


def _staleness(axes: Axes, history: Sequence[Entry]) -> bool:
    average = series(history, "staleness/mean")
    low, high = series(history, "staleness/min"), series(history, "staleness/max")
    if low and high and low.steps == high.steps:
        axes.fill_between(low.steps, low.values, high.values, step="mid", color=_PURPLE, alpha=0.15, linewidth=0)
    if average:
        axes.step(average.steps, average.values, where="mid", color=_PURPLE, label="mean")
    axes.set_ylabel("global steps")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return bool(average)


def _length(axes: Axes, history: Sequence[Entry]) -> bool:
    average, high = series(history, "response/length_mean"), series(history, "response/length_max")
    _line(axes, average, _BLUE, "mean", smoothed=True)
    _line(axes, high, _GREY, "longest")
    axes.set_ylabel("tokens")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return bool(average or high)


def _phases(axes: Axes, history: Sequence[Entry]) -> bool:
    entries = [entry for entry in history if "time/step_s" in entry.metrics]
    if not entries:
        return False
    parts = [[entry.metrics.get(name, 0.0) for entry in entries] for name in _PHASES]
    known = [sum(seconds) for seconds in zip(*parts, strict=True)]
    rest = [max(entry.metrics["time/step_s"] - spent, 0.0) for entry, spent in zip(entries, known, strict=True)]
    steps = [entry.step for entry in entries]
    labels, colors = [label for label, _ in _PHASES.values()], [color for _, color in _PHASES.values()]
    axes.stackplot(steps, *parts, rest, labels=[*labels, "other"], colors=[*colors, "#e2e8f0"], alpha=0.85, linewidth=0)
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return True


def _sample_shares(axes: Axes, history: Sequence[Entry]) -> bool:
    equal, truncated = series(history, "reward/equal_groups"), series(history, "response/truncated_fraction")
    _line(axes, equal, _PURPLE, "groups with equal rewards", smoothed=True)
    _line(axes, truncated, _ORANGE, "responses cut at the limit", smoothed=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    _legend(axes)
    return bool(equal or truncated)


def _throughput(axes: Axes, history: Sequence[Entry]) -> bool:
    responses = series(history, "throughput/response_tokens_per_s")
    trained = series(history, "throughput/trained_tokens_per_s")
    _line(axes, responses, _ORANGE, "response tokens per second of step", smoothed=True)
    _line(axes, trained, _BLUE, "trained tokens per second of training", smoothed=True)
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return bool(responses or trained)


_CHARTS: list[tuple[str, str, Callable[[Axes, Sequence[Entry]], bool]]] = [
    (
        "Accuracy",
        "Rollouts lag behind the policy; held-out points are of that policy version (bars: one standard error).",
        _accuracy,
    ),
    ("Entropy", "Mean over response tokens. A collapse towards 0 ends exploration.", _entropy),
    (
        "Importance ratio",
        "Current over behavior policy, per token. Its spread is the off-policy drift.",
        _ratio,
    ),
    (
        "Prefix minimum",
        "The smallest ratio among a token's predecessors, which weighs the token.",
        _prefix_min,
    ),
    ("Tokens affected", "Shares of response tokens.", _token_shares),
    ("Gradient norm", "Of an update, before clipping.", _grad_norm),
    (
        "Trainer and server",
        "Difference of their log-probs under the same weights: engine mismatch, not drift.",
        _mismatch,
    ),
    ("Staleness", "Policy version minus the version that sampled the batch.", _staleness),
    (
        "Samples without a lesson",
        "Groups with equal rewards give no gradient; cut responses were graded unfinished.",
        _sample_shares,
    ),
    ("Response length", "Tokens, the stop token included.", _length),
    ("Time per step", "Where a global step's seconds go.", _phases),
    (
        "Throughput",
        "Response tokens as rollouts deliver them, all tokens as training consumes them.",
        _throughput,
    ),
]
