"""The run's report: one self-contained HTML file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from minpro_megatron.config.renamed import under_current_names
from minpro_megatron.files.json_files import read_json, read_json_lines
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.monitor.environment import read_environment
from minpro_megatron.monitor.history import Entry
from minpro_megatron.monitor.progress import duration
from minpro_megatron.monitor.samples import read_samples
from minpro_megatron.monitor.summary import RunSummary, read_summary
from minpro_megatron.report.pages import first_known, percent, render, reward_text, short
from minpro_megatron.report.settings import described
from minpro_megatron.report.shown_samples import shown
from minpro_megatron.run_folder.run_inputs import read_inputs

FILE_NAME = "report.html"
ALARMS_FILE = "alarms.jsonl"
MAX_ALARMS = 200


def write_report(run_dir: Path, summary: RunSummary | None = None) -> Path:
    """Writes `run_dir/report.html` and returns its path.

    It is made from run.json, metrics.jsonl, alarms.jsonl, samples.jsonl, environment.json and, for a finished run,
    `summary`, by default that of summary.json; missing files are skipped.
    """
    # imports matplotlib, and every trainer rank imports this file
    from minpro_megatron.report.run_charts import charts
    from minpro_megatron.report.run_history import valid_history

    run_dir = Path(run_dir)
    config = under_current_names(read_json(run_dir / "run.json"), old_wins=True)
    history = valid_history(run_dir)
    summary = summary or _summary(run_dir)
    sections = described(config)
    found = charts(history)
    page = render(
        "report.html.jinja",
        {
            "name": short(config.get("name", run_dir.name), 200),
            "subtitle": _subtitle(config, summary),
            "cards": _cards(config, history, summary),
            "changed_inputs": _changed_inputs(run_dir),
            "alarms": _alarms(run_dir),
            "sections": {c.section: [other for other in found if other.section == c.section] for c in found},
            "evaluations": _evaluations(history),
            "phases": _phases(history, summary),
            "samples": shown(read_samples(run_dir)),
            "changed": [_row(s) for settings in sections.values() for s in settings if s.is_changed],
            "settings": {section: [_row(s) for s in settings] for section, settings in sections.items()},
            "environment": read_environment(run_dir) or (summary.package_versions if summary else {}),
        },
    )
    path = run_dir / FILE_NAME
    replace_file(path, page)
    return path


def _summary(run_dir: Path) -> RunSummary | None:
    try:
        return read_summary(run_dir)
    except ValueError:
        return None  # written by another version: the metrics contain most of its values


def _subtitle(config: Mapping[str, Any], summary: RunSummary | None) -> str:
    parts = []
    for label, section, key in (("objective", "objective", "name"), ("model", "model", "hf_path")):
        if isinstance(inner := config.get(section), dict) and key in inner:
            parts.append(f"{label} {short(inner[key], 200)}")
    staleness = config.get("staleness")
    if isinstance(staleness, dict):
        bounded = staleness.get("mode") == "bounded"
        steps = staleness.get("max_staleness" if bounded else "delay_steps")
        parts.append(f"{'at most ' if bounded else ''}{short(steps, 20)} global steps stale")
    if "seed" in config:
        parts.append(f"seed {short(config['seed'], 20)}")
    parts.append("finished" if summary else "not finished")
    return " · ".join(parts)


def _cards(config: Mapping[str, Any], history: Sequence[Entry], summary: RunSummary | None) -> list[dict[str, str]]:
    """The headline figures, from the summary or from the history so far."""
    steps = [entry for entry in history if entry.is_global_step]
    if summary is None:
        latest = steps[-1].metrics if steps else {}
        return [
            {"label": "Global steps", "value": f"{len(steps)} of {short(config.get('num_global_steps', '?'), 20)}"},
            {"label": "Accuracy of the last step", "value": percent(latest.get("reward/accuracy"))},
            {"label": "Mean reward of the last step", "value": reward_text(latest.get("reward/mean"))},
        ]
    return [
        _accuracy_card(summary),
        *_reward_card(summary),
        {"label": "Global steps", "value": f"{summary.steps}", "note": f"{summary.updates} optimizer updates"},
        _time_card(steps, summary),
        {
            "label": "Staleness",
            "value": f"{summary.smallest_staleness} to {summary.largest_staleness}",
            "note": f"global steps; {summary.versions_published} versions published",
        },
        {
            "label": "Prompt groups",
            "value": f"{summary.groups_consumed}",
            "note": f"trained of {summary.groups_issued} issued; {summary.groups_dropped} dropped"
            + (f", {summary.groups_not_graded} of them not graded" if summary.groups_not_graded else ""),
        },
    ]


def _time_card(steps: Sequence[Entry], summary: RunSummary) -> dict[str, str]:
    """The time of the run; the summary knows only the last of its starts."""
    seconds = _step_seconds(steps)
    if not seconds:
        return {"label": "Wall time", "value": duration(summary.wall_time_s)}
    per_step = f"{sum(seconds) / len(seconds):.1f} s per step"
    return {"label": "Time of the global steps", "value": duration(sum(seconds)), "note": f"{per_step}, without starts"}


def _step_seconds(history: Sequence[Entry]) -> list[float]:
    times = (entry.metrics.get("time/step_s", math.nan) for entry in history)
    return [seconds for seconds in times if math.isfinite(seconds)]


def _accuracy_card(summary: RunSummary) -> dict[str, str]:
    before, after = summary.pass_at_1_before, summary.pass_at_1_after
    if before is None:
        if after is None:
            return {"label": "Held-out pass@1", "value": "not evaluated"}
        return {"label": "Held-out pass@1", "value": percent(after), "note": "the initial weights were not evaluated"}
    if after is None:
        return {"label": "Held-out pass@1", "value": percent(before), "note": "one evaluation only"}
    errors = f"± {percent(summary.standard_error_before)} → ± {percent(summary.standard_error_after)}"
    return {
        "label": "Held-out pass@1, before and after",
        "before": percent(before),
        "value": percent(after),
        "note": f"standard errors {errors}; {summary.num_evaluation_samples} samples each",
    }


def _changed_inputs(run_dir: Path) -> list[dict[str, str]]:
    """The changes of inputs: figures before and after such a change belong to different data."""
    try:
        inputs = read_inputs(run_dir)
    except ValueError:
        return []
    changes = inputs.changes if inputs else []
    return [
        {"step": str(change.global_step), "names": ", ".join(short(name, 100) for name in change.names)}
        for change in changes
    ]


def _reward_card(summary: RunSummary) -> list[dict[str, str]]:
    before, after = summary.mean_reward_before, summary.mean_reward_after
    if before is None or after is None:
        return []
    if (before, after) == (summary.pass_at_1_before, summary.pass_at_1_after):
        return []  # rewards of 0 and 1: the card of pass@1 has the same numbers
    label = "Held-out mean reward, before and after"
    return [{"label": label, "before": reward_text(before), "value": reward_text(after)}]


def _alarms(run_dir: Path) -> list[dict[str, str]]:
    found = [alarm for alarm in read_json_lines(run_dir / ALARMS_FILE) if "name" in alarm]
    return [
        {
            "step": short(alarm.get("step", "-"), 20),
            "name": short(alarm["name"], 100),
            "seen": first_known(alarm, ("line", "seen")),
            "remedy": first_known(alarm, ("remedy",)),
        }
        for alarm in found[-MAX_ALARMS:]
    ]


def _evaluations(history: Sequence[Entry]) -> list[dict[str, str]]:
    return [
        {
            "version": str(entry.step),
            "pass_at_1": percent(entry.metrics["eval/pass_at_1"]),
            "standard_error": percent(entry.metrics.get("eval/standard_error"), digits=2),
            "mean_reward": reward_text(entry.metrics.get("eval/mean_reward")),
            "not_graded": f"{entry.metrics.get('eval/not_graded', 0):.0f}",
            "tokens": f"{entry.metrics.get('eval/response_length_mean', math.nan):.1f}",
        }
        for entry in history
        if "eval/pass_at_1" in entry.metrics
    ]


def _phases(history: Sequence[Entry], summary: RunSummary | None) -> list[dict[str, Any]]:
    """The trainer's time per phase, longest first: of the entire run, and per step."""
    by_phase: dict[str, list[float]] = {}
    for entry in history:
        for name, seconds in entry.metrics.items():
            if name.startswith("time/") and name.endswith("_s") and name != "time/step_s" and math.isfinite(seconds):
                by_phase.setdefault(name.removeprefix("time/").removesuffix("_s"), []).append(seconds)
    totals = {phase: sum(seconds) for phase, seconds in by_phase.items()}
    whole = sum(_step_seconds(history))
    if not totals and summary is not None:  # it knows only the last start of the run
        totals, whole = summary.wall_time_by_phase_s, summary.wall_time_s
    whole = max(whole, sum(totals.values()), 1e-9)
    return [
        {
            "phase": phase.replace("_", " "),
            "time": duration(seconds) if seconds >= 60 else f"{seconds:.1f} s",
            "percent": round(100 * seconds / whole),
            "median": f"{median(by_phase[phase]):.2f} s" if phase in by_phase else "-",
            "longest": f"{max(by_phase[phase]):.2f} s" if phase in by_phase else "-",
        }
        for phase, seconds in sorted(totals.items(), key=lambda item: -item[1])
    ]


def _row(setting: Any) -> dict[str, str]:
    default = "" if setting.default is None else short(setting.default)
    return {
        "name": short(setting.name, 200),
        "value": short(setting.value),
        "default": default if setting.is_changed else "",
        "description": setting.description,
    }
