"""The run's report: one HTML file with everything inside it, to look at and to send on."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from minpro_megatron.monitor.files import replace_file
from minpro_megatron.monitor.history import Entry, read_history
from minpro_megatron.monitor.progress import duration
from minpro_megatron.monitor.summary import RunSummary, read_summary

FILE_NAME = "report.html"
SAMPLES_FILE = "samples.jsonl"
_MAX_SAMPLES = 40
_MAX_CHARACTERS = 2000  # of one field of a sample: a report with a hundred long responses helps nobody


def write_report(run_dir: Path, samples: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Writes `run_dir/report.html` and returns its path.

    It is made from run.json, metrics.jsonl and, for a finished run, summary.json. `samples` are rollouts to
    show, such as {"step": 7, "prompt": ..., "response": ..., "reward": 1.0}; None: those of samples.jsonl, if
    there are any.
    """
    from minpro_megatron.monitor.figures import charts  # matplotlib: every trainer rank imports this file

    run_dir = Path(run_dir)
    config = _read_config(run_dir)
    history = read_history(run_dir)
    summary = read_summary(run_dir)
    shown = _shortened(_read_samples(run_dir) if samples is None else samples)
    # autoescape: prompts and responses are text from outside, and the report is opened in a browser.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        name=config.get("name", run_dir.name),
        subtitle=_subtitle(config, summary),
        cards=_cards(config, history, summary),
        charts=[
            {"title": chart.title, "caption": chart.caption, "data": _base64(chart.svg)} for chart in charts(history)
        ],
        evaluations=_evaluations(history),
        phases=_phases(summary),
        samples=shown,
        sample_columns=list(dict.fromkeys(key for sample in shown for key in sample)),
        settings=_settings(config),
        packages=summary.package_versions if summary else {},
    )
    path = run_dir / FILE_NAME
    replace_file(path, page)
    return path


def _read_config(run_dir: Path) -> dict[str, Any]:
    # Plain JSON: the report of an old run must not depend on today's settings being the same.
    try:
        return json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _read_samples(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / SAMPLES_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[-_MAX_SAMPLES:]]


def _shortened(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{key: _short(value) for key, value in sample.items()} for sample in samples[-_MAX_SAMPLES:]]


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ... ({len(text)} characters)"


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _subtitle(config: Mapping[str, Any], summary: RunSummary | None) -> str:
    parts = []
    if "objective" in config:
        parts.append(f"objective {config['objective']['name']}")
    if "model" in config:
        parts.append(f"model {config['model']['hf_path']}")
    if "staleness" in config:
        parts.append(f"delay of {config['staleness'].get('delay_steps')} global steps")
    if "seed" in config:
        parts.append(f"seed {config['seed']}")
    parts.append("finished" if summary else "not finished")
    return " · ".join(parts)


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def _cards(config: Mapping[str, Any], history: Sequence[Entry], summary: RunSummary | None) -> list[dict[str, str]]:
    """The headline figures: of the summary, or of what there is so far."""
    steps = [entry for entry in history if entry.is_global_step]
    if summary is None:
        latest = steps[-1].metrics if steps else {}
        return [
            {"label": "Global steps", "value": f"{len(steps)} of {config.get('num_global_steps', '?')}"},
            {"label": "Accuracy of the last step", "value": _percent(latest.get("reward/accuracy"))},
        ]
    seconds_per_step = summary.wall_time_s / max(summary.steps, 1)
    return [
        _accuracy_card(summary),
        {
            "label": "Global steps",
            "value": f"{summary.steps}",
            "note": f"{summary.updates} optimizer updates",
        },
        {
            "label": "Wall time",
            "value": duration(summary.wall_time_s),
            "note": f"{seconds_per_step:.1f} s per step",
        },
        {
            "label": "Staleness",
            "value": f"{summary.smallest_staleness} to {summary.largest_staleness}",
            "note": f"global steps; {summary.versions_published} versions published",
        },
        {
            "label": "Prompt groups",
            "value": f"{summary.groups_consumed}",
            "note": f"trained of {summary.groups_issued} issued; {summary.groups_dropped} dropped",
        },
    ]


def _accuracy_card(summary: RunSummary) -> dict[str, str]:
    before, after = summary.pass_at_1_before, summary.pass_at_1_after
    if before is None:
        return {"label": "Held-out pass@1", "value": "not evaluated"}
    if after is None:
        return {"label": "Held-out pass@1", "value": _percent(before), "note": "one evaluation only"}
    errors = f"± {_percent(summary.standard_error_before)} → ± {_percent(summary.standard_error_after)}"
    return {
        "label": "Held-out pass@1, before and after",
        "before": _percent(before),
        "value": _percent(after),
        "note": f"standard errors {errors}; {summary.num_evaluation_samples} samples each",
    }


def _evaluations(history: Sequence[Entry]) -> list[dict[str, str]]:
    return [
        {
            "version": str(entry.step),
            "pass_at_1": _percent(entry.metrics["eval/pass_at_1"]),
            "standard_error": _percent(entry.metrics.get("eval/standard_error"), digits=2),
            "tokens": f"{entry.metrics.get('eval/response_length_mean', math.nan):.1f}",
        }
        for entry in history
        if "eval/pass_at_1" in entry.metrics
    ]


def _phases(summary: RunSummary | None) -> list[dict[str, Any]]:
    if summary is None or not summary.wall_time_by_phase_s:
        return []
    whole = max(summary.wall_time_s, sum(summary.wall_time_by_phase_s.values()), 1e-9)
    longest_first = sorted(summary.wall_time_by_phase_s.items(), key=lambda item: -item[1])
    return [
        {"phase": phase, "time": duration(seconds), "percent": round(100 * seconds / whole)}
        for phase, seconds in longest_first
    ]


def _settings(config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The settings by section; those that stand in no section come first."""
    plain = [(key, _short(value)) for key, value in config.items() if not isinstance(value, dict)]
    sections = {"run": plain} if plain else {}
    for key, value in config.items():
        if isinstance(value, dict):
            sections[key] = [(name, _short(inner)) for name, inner in value.items()]
    return sections
