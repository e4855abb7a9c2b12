"""Charts for pages: series of a run's history, drawn as SVG that follows the page's light or dark theme."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from minpro_megatron.monitor.history import Entry

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2563eb", "#d97706", "#0f9d76", "#7c3aed", "#94a3b8"
RED, PINK, TEAL, BROWN, LIME = "#dc2626", "#db2777", "#0891b2", "#92400e", "#65a30d"
PALE = "#e2e8f0"
# In the order in which the lines of a chart use them.
COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, PINK, LIME, BROWN, GREY)
_EDGE, _LABEL, _TICK, _GRID = "#cbd5e1", "#475569", "#64748b", "#eef2f7"
STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": _EDGE,
    "axes.labelcolor": _LABEL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _TICK,
    "ytick.color": _TICK,
    "text.color": _LABEL,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "minpro-megatron",  # the same run gives the same file
    "svg.fonttype": "none",  # text stays text: smaller, and it can be selected
    "axes.formatter.limits": (-3, 5),  # numbers with more digits would not fit next to the axis
    "axes.formatter.useoffset": False,
    "font.family": "DejaVu Sans",  # part of matplotlib, so that widths do not depend on the machine
}
# The page's CSS variables, which its style sheet sets for the light and the dark theme (page_style.html.jinja).
VARIABLES = {
    BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple", GREY: "grey", RED: "red", PINK: "pink",
    TEAL: "teal", BROWN: "brown", LIME: "lime", PALE: "pale", _EDGE: "edge", _LABEL: "label", _TICK: "tick",
    _GRID: "grid", "#000000": "label", "#ffffff": "paper",
}  # fmt: skip
Draw = Callable[[Axes, Sequence[Entry]], bool]  # draws a history on axes; False: the history has no values for them
_WIDTH, _HEIGHT = 5.0, 2.6  # inches; text of 9 points is then readable on a phone
_LOG_FROM = {"log": 3.0, "wide": 30.0}  # largest over smallest positive value
_LEGEND_ROW = 0.065  # of the picture's height
_INNER = (0.145, 0.165, 0.84, 0.735)  # left, bottom, width, height: equal for all charts, so that their axes align


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


def family(history: Sequence[Entry], prefix: str) -> dict[str, Series]:
    """The series whose names begin with `prefix`, by the rest of the name; numbers are in numerical order."""
    rests = {name.removeprefix(prefix) for entry in history for name in entry.metrics if name.startswith(prefix)}
    ordered = sorted(rests, key=lambda rest: (not rest.isdecimal(), int(rest) if rest.isdecimal() else 0, rest))
    return {rest: series(history, prefix + rest) for rest in ordered}


def smooth(values: Sequence[float], window: int | None = None) -> list[float]:
    """A centred running mean over `window` values (None: a twentieth of them); values that are not finite are
    skipped."""
    half = len(values) // 40 if window is None else window // 2
    smoothed = []
    for index in range(len(values)):
        near = [value for value in values[max(index - half, 0) : index + half + 1] if math.isfinite(value)]
        smoothed.append(sum(near) / len(near) if near else math.nan)
    return smoothed


@dataclass(frozen=True, slots=True)
class Line:
    """A metric as a line of a chart."""

    metric: str
    label: str
    color: str
    smoothed: bool = False


@contextmanager
def drawing() -> Iterator[None]:
    """Draws charts inside the block in this file's style."""
    with mpl.rc_context(STYLE):
        yield


def picture(draw: Callable[[Axes], bool], x_label: str = "global step") -> Markup | None:
    """The chart that `draw` draws, as an SVG element for a page with page_style; None if `draw` returns False."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    FigureCanvasAgg(figure)
    axes = figure.add_axes(_INNER)
    if not draw(axes):
        return None
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True
    )
    return themed(buffer.getvalue())


def themed(svg: str) -> Markup:
    """matplotlib's SVG file as an element within a page: with the colors of the page and the width of its
    container."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' (?:width|height)="[0-9.]+pt"', "", element, count=2)
    element = re.sub("#[0-9a-f]{6}", lambda found: _variable(found.group()), element)
    # safe: charts contain only numbers and fixed texts, no text from outside
    return Markup(element.replace("<svg ", '<svg aria-hidden="true" ', 1))


def _variable(color: str) -> str:
    return f"var(--{VARIABLES[color]})" if color in VARIABLES else color


def line(
    axes: Axes, data: Series, color: str, label: str = "", *, smoothed: bool = False, window: int | None = None
) -> None:
    """The series; `smoothed`: its running mean in front of the pale values, if there are enough."""
    if not data:
        return
    if smoothed and (len(data.values) >= 40 if window is None else window > 1):
        axes.plot(data.steps, data.values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(data.steps, smooth(data.values, window), color=color, label=label)
    else:
        axes.plot(data.steps, data.values, color=color, label=label, marker="." if len(data.steps) < 3 else "")


def legend(axes: Axes) -> None:
    """Places the legend above the chart, where it does not cover lines."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) < 2:
        return
    columns = len(handles) if len(handles) <= 5 else 4
    left, bottom, width, height = _INNER
    axes.set_position((left, bottom, width, height - (math.ceil(len(handles) / columns) - 1) * _LEGEND_ROW))
    axes.legend(
        handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=columns, columnspacing=1.2,
        handlelength=1.2, borderaxespad=0.2,
    )  # fmt: skip


def scale(axes: Axes, kind: str, data: Sequence[Series]) -> None:
    """Sets the scale. `share`: percent from 0; `zero` and `counts`: from 0; `free`: chosen by matplotlib; `log` and
    `wide`: logarithmic if positive values differ enough (see _LOG_FROM), else as `free` and `zero`."""
    values = [value for one in data for value in one.values if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    spread = max(positive) / min(positive) if positive else 1.0
    if spread > _LOG_FROM.get(kind, math.inf):
        _log_scale(axes, spread)
    elif kind not in ("free", "log"):
        axes.set_ylim(bottom=min([0.0, *values]))
        if kind == "share":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _log_scale(axes: Axes, spread: float) -> None:
    """A logarithmic scale with short numbers, and with labels between powers of ten if there are few of these."""
    axes.set_yscale("log", nonpositive="mask")
    # 0.0001 would push the unit out of the chart
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value < 1e-3 else f"{value:g}"))
    if spread < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 100 else (1, 3)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def lines(*parts: Line, kind: str = "zero", unit: str = "", at: float | None = None) -> Draw:
    """A chart of metrics in one unit; `at` is a value to compare them with."""

    def draw(axes: Axes, history: Sequence[Entry]) -> bool:
        data = [series(history, part.metric) for part in parts]
        for part, one in zip(parts, data, strict=True):
            line(axes, one, part.color, part.label, smoothed=part.smoothed)
        return dressed(axes, data, kind, unit, at)

    return draw


def of_family(
    prefix: str, label: str, kind: str = "zero", unit: str = "", *, minimum: int = 1, maximum: int = len(COLORS)
) -> Draw:
    """A chart of the metrics whose names begin with `prefix`: at most `maximum` of them, and no chart for fewer than
    `minimum`. A line's label is `label` and the rest of its name."""

    def draw(axes: Axes, history: Sequence[Entry]) -> bool:
        found = dict(list(family(history, prefix).items())[:maximum])
        if len(found) < minimum:
            return False
        for (rest, data), color in zip(found.items(), COLORS, strict=False):
            line(axes, data, color, f"{label}{_plain(rest)}", smoothed=True)
        return dressed(axes, list(found.values()), kind, unit)

    return draw


def _plain(text: str) -> str:
    """Escapes dollar signs, between which matplotlib sets a formula: benchmark names come from outside."""
    return "".join(c for c in text.replace("_", " ") if c.isprintable() and c != "$")[:24]


def dressed(axes: Axes, data: Sequence[Series], kind: str, unit: str = "", at: float | None = None) -> bool:
    """Sets scale, unit and legend of axes with `data`; False if there is no data, or only `counts` of 0."""
    if not any(data) or (kind == "counts" and not any(value for one in data for value in one.values)):
        return False
    if at is not None:
        axes.axhline(at, color=GREY, linewidth=0.8, linestyle=":")
    if unit:
        axes.set_ylabel(unit, labelpad=2)
    scale(axes, kind, data)
    if unit and axes.get_yscale() == "linear":
        axes.ticklabel_format(axis="y", scilimits=(-2, 5))  # numbers such as 0.0125 would push the unit out
    legend(axes)
    return True
