"""A chart of pass@k over k: one line per benchmark, with its confidence interval."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from minpro_megatron.report.figures import STYLE

_COLORS = ("#2563eb", "#d97706", "#0f9d76", "#7c3aed", "#dc2626", "#0891b2", "#475569")
_BAND_ALPHA = 0.12


@dataclass(frozen=True, slots=True)
class Curve:
    """pass@1, pass@2, ... of a benchmark as shares, with the bounds of their confidence intervals."""

    title: str
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def pass_at_k_png(curves: Sequence[Curve], heading: str) -> bytes:
    """The chart as PNG. The axis of k is logarithmic; a benchmark with one sample per prompt is a point."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for place, curve in enumerate(curves):
            color, ks = _COLORS[place % len(_COLORS)], range(1, len(curve.values) + 1)
            axes.fill_between(ks, curve.low, curve.high, color=color, alpha=_BAND_ALPHA, linewidth=0)
            short = len(curve.values) <= 2
            axes.plot(ks, curve.values, color=color, label=curve.title, marker="o" if short else "", markersize=3.5)
        largest = max(len(curve.values) for curve in curves)
        ticks = [1 << i for i in range(largest.bit_length())]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(1 / 1.08, max(largest, 2) * 1.08)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.set_xlabel("k (samples)")
        axes.set_ylabel("pass@k")
        axes.set_title(heading, loc="left", fontsize=9, color="#475569")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
