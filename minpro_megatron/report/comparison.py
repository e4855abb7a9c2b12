"""Compares several runs in one HTML page: overlaid curves, results, and the settings that differ."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes

from minpro_megatron.config.renamed import under_current_names
from minpro_megatron.errors import UserError
from minpro_megatron.files.json_files import read_json, read_json_lines
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.metrics.declared import METRICS
from minpro_megatron.monitor.history import FILE_NAME as HISTORY_FILE
from minpro_megatron.monitor.history import Entry
from minpro_megatron.monitor.progress import duration
from minpro_megatron.report import figures
from minpro_megatron.report.pages import percent, render, reward_text, short
from minpro_megatron.report.report import ALARMS_FILE
from minpro_megatron.report.run_history import figures_of, valid_history
from minpro_megatron.report.settings import defaults_for, flat
from minpro_megatron.report.usual_metrics import USUAL_METRICS

_DASHES = ("-", "--", ":", "-.")  # for more runs than there are colors
_IS_A_NAME = ("name", "runs_dir")  # settings that do not affect what a run computes


@dataclass(frozen=True)
class Run:
    """A run to compare, as read from its folder."""

    label: str
    settings: dict[str, Any]  # section.key -> value, defaults included; empty if run.json is missing or broken
    history: list[Entry]
    finished: bool
    num_alarms: int


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give run folders, such as runs/demo")
    if not (folder / HISTORY_FILE).is_file():
        raise UserError(f"{folder}: it contains no {HISTORY_FILE}: it is not a run folder, or the run has not started")
    try:
        history = valid_history(folder)
    except OSError as error:
        raise UserError(f"{folder}: {HISTORY_FILE} cannot be read: {error}") from None
    config = under_current_names(read_json(folder / "run.json"), old_wins=True)
    return Run(
        label=short(config.get("name", folder.resolve().name), 100),
        settings={**dict(flat(defaults_for(config))), **dict(flat(config))} if config else {},
        history=history,
        finished=(folder / "summary.json").is_file(),
        num_alarms=len(read_json_lines(folder / ALARMS_FILE)),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, with distinct labels. Raises UserError if a folder contains no run or is given twice."""
    places = [folder.resolve() for folder in folders]
    for place, folder in enumerate(folders):
        if places[place] in places[:place]:
            raise UserError(f"{folder}: given twice; name each run once")
    runs = [read_run(folder) for folder in folders]
    labels = [run.label for run in runs]
    return [
        replace(run, label=short(folder, 200)) if labels.count(run.label) > 1 else run
        for run, folder in zip(runs, map(str, folders), strict=True)
    ]


def write_comparison(runs: Sequence[Run], path: Path, metrics: Sequence[str] = (), window: int | None = None) -> None:
    """Writes the page with these runs to `path`. `metrics`: metrics to draw instead of USUAL_METRICS; `window`: global
    steps of the running mean (1: no smoothing; None: a twentieth of a run).

    Raises UserError for a metric that no run has, and if there is nothing to draw.
    """
    known = {name for run in runs for entry in run.history for name in entry.metrics}
    if not known:
        raise UserError(f"none of the {len(runs)} runs has written a metric yet; wait for their first global step")
    for name in metrics:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 3, 0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"--metrics: none of the runs has {name!r}{hint}")
    with figures.drawing():
        charts = [_chart(runs, name, window) for name in (metrics or USUAL_METRICS) if name in known]
    results = [{"label": run.label, "color": _color(place), "figures": _results(run)} for place, run in enumerate(runs)]
    page = render(
        "comparison.html.jinja",
        {
            "runs": [{"label": run.label, "color": _color(place)} for place, run in enumerate(runs)],
            "results": results,
            "figures": list(results[0]["figures"]),
            "charts": charts,
            "differences": differing_settings(runs),
            "without_settings": [run.label for run in runs if not run.settings],
        },
    )
    replace_file(path, page)


def _color(place: int) -> Markup:
    return Markup(f"var(--{figures.VARIABLES[figures.COLORS[place % len(figures.COLORS)]]})")


def _chart(runs: Sequence[Run], name: str, window: int | None) -> dict[str, Any]:
    declared = METRICS.get(name)
    unit = declared.unit if declared else ""

    def draw(axes: Axes) -> bool:
        data = [figures.series(run.history, name) for run in runs]
        for place, one in enumerate(data):
            before = len(axes.lines)
            color = figures.COLORS[place % len(figures.COLORS)]
            figures.line(axes, one, color, smoothed=not name.startswith("eval"), window=window)
            for drawn in axes.lines[before:]:
                drawn.set_linestyle(_DASHES[place // len(figures.COLORS) % len(_DASHES)])
                if name.startswith("eval"):
                    drawn.set_marker("o")
                    drawn.set_markersize(3)
        negative = any(value < 0 for one in data for value in one.values)
        # prefix minima lie close to 1: from 0, the curves of all runs would be one line
        free = negative or name.startswith("prefix_min/")
        kind = "share" if unit == "share" else "free" if free else "wide"
        return figures.dressed(axes, data, kind, "" if unit == "share" else unit)

    return {"title": name, "caption": declared.description if declared else "", "svg": figures.picture(draw)}


class _Shown(NamedTuple):
    """A figure of a run as text, and what is written below it."""

    value: str
    note: str = ""


def _results(run: Run) -> dict[str, _Shown]:
    """The figures of a run by their heading, in the order of the page."""
    found = figures_of(run.history)
    wanted = run.settings.get("num_global_steps")
    stale = None if found.largest_staleness is None else f"at most {found.largest_staleness:g}"
    return {
        "global steps": _Shown(str(found.num_steps), "" if run.finished else f"of {short(wanted or '?', 20)}"),
        "held-out pass@1": _Shown(percent(found.held_out), _best(found.best_held_out, "version")),
        "held-out mean reward": _Shown(reward_text(found.held_out_reward)),
        "training accuracy": _Shown(percent(found.accuracy), _best(found.best_accuracy, "step")),
        "training mean reward": _Shown(reward_text(found.reward)),
        "collapsed": _Shown("no" if found.collapsed_at is None else f"step {found.collapsed_at}"),
        "staleness": _Shown("-" if found.mean_staleness is None else f"{found.mean_staleness:.2f}", stale or ""),
        "time": _Shown(
            "-" if found.total_s is None else duration(found.total_s),
            "" if found.step_s is None else f"{found.step_s:.2f} s per step",
        ),
        "alarms": _Shown(str(run.num_alarms)),
    }


def _best(best: tuple[float, int] | None, where: str) -> str:
    return "" if best is None else f"best {percent(best[0])} at {where} {best[1]}"


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(section.key, its value in each run) of the settings in which the runs differ; "-" if a run does not have
    the setting. Runs with unknown settings are ignored."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    found = []
    for name in names:
        values = [_same_form(run.settings.get(name, math.nan)) for run in runs if run.settings]
        if name not in _IS_A_NAME and len({repr(value) for value in values}) > 1:
            found.append(
                (short(name, 200), [short(run.settings[name], 300) if name in run.settings else "-" for run in runs])
            )
    return found


def _same_form(value: Any) -> Any:
    """A form in which 1 and 1.0 are equal."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
