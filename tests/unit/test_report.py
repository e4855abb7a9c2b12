"""The summary's round trip and the report: complete, self-contained and safe to open."""

import json
import math
import re
from base64 import b64decode

import msgspec
import pytest

from minpro_megatron.monitor.figures import charts, smooth
from minpro_megatron.monitor.history import Entry, encode_entry
from minpro_megatron.monitor.report import write_report
from minpro_megatron.monitor.summary import read_summary, summarize, write_summary
from minpro_megatron.records import CollectorTotals, EvaluationResult
from tests.unit.run_examples import example_config

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def evaluation(version: int, pass_at_1: float) -> EvaluationResult:
    return EvaluationResult(
        policy_version=version, pass_at_1=pass_at_1, standard_error=0.0125, num_prompts=16, samples_per_prompt=8,
        mean_response_tokens=5.5, wall_time_s=1.0,
    )  # fmt: skip


def totals(*evaluations: EvaluationResult) -> CollectorTotals:
    return CollectorTotals(
        groups_issued=16, groups_consumed=15, groups_dropped=1, smallest_staleness=0, largest_staleness=2,
        versions_published=5, evaluations=list(evaluations),
    )  # fmt: skip


def example_summary(folder, *evaluations):
    return summarize(
        example_config(folder), totals(*evaluations), steps=4, updates=8, wall_time_s=100.0,
        wall_time_by_phase_s={"train": 60.0, "publish": 20.0}, hf_export=folder / "hf_export",
    )  # fmt: skip


def test_a_summary_is_of_the_held_out_prompts(tmp_path):
    benchmarks = [msgspec.structs.replace(evaluation(version, 0.9), benchmark="aime24") for version in (0, 4)]
    both = example_summary(tmp_path, benchmarks[0], evaluation(0, 0.25), benchmarks[1], evaluation(4, 0.5))
    assert (both.pass_at_1_before, both.pass_at_1_after) == (0.25, 0.5)
    assert example_summary(tmp_path, *benchmarks).pass_at_1_before is None


def history(steps: int) -> list[Entry]:
    names = ("reward/accuracy", "policy/entropy", "ratio/mean", "ratio/min", "ratio/max", "staleness/mean")
    times = {"time/train_s": 0.5, "time/publish_s": 0.1, "time/step_s": 0.8}
    return [Entry(step, 100.0 + step, dict.fromkeys(names, 0.5) | times) for step in range(steps)]


def write_run(folder, entries):
    (folder / "run.json").write_text(example_config(folder).to_json())
    (folder / "metrics.jsonl").write_text("".join(map(encode_entry, entries)))


def test_the_summary_survives_its_file(tmp_path):
    assert read_summary(tmp_path) is None
    summary = example_summary(tmp_path, evaluation(4, 0.5), evaluation(0, 0.125))
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    assert (summary.pass_at_1_before, summary.pass_at_1_after) == (0.125, 0.5)
    assert summary.num_evaluation_samples == 128
    assert summary.package_versions["torch"]


def test_one_evaluation_is_before_and_not_after(tmp_path):
    summary = example_summary(tmp_path, evaluation(0, 0.125))
    assert (summary.pass_at_1_before, summary.pass_at_1_after) == (0.125, None)
    assert example_summary(tmp_path).pass_at_1_before is None


def test_a_finished_run_has_its_figures_and_pictures(tmp_path):
    write_run(tmp_path, [*history(5), Entry(0, 1.0, {"eval/pass_at_1": 0.125})])
    write_summary(tmp_path, example_summary(tmp_path, evaluation(0, 0.125), evaluation(4, 0.5)))
    page = write_report(tmp_path).read_text()
    assert "12.5 %" in page
    assert "50.0 %" in page
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == 5  # accuracy, entropy, ratio, staleness, time per step
    assert all(b"<svg" in b64decode(picture) for picture in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must not load anything"
    assert "num_global_steps" in page


def test_a_run_without_metrics_or_settings_still_has_a_report(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "has written no metrics" in page
    assert "not finished" in page


def test_hostile_text_is_shown_as_text(tmp_path):
    write_run(tmp_path, [])
    sample = {"step": 1, "prompt": "1+1=", "response": HOSTILE, HOSTILE: 1.0}
    page = write_report(tmp_path, [sample]).read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") == 2


def test_samples_are_read_from_the_run_folder_and_cut(tmp_path):
    write_run(tmp_path, [])
    lines = [json.dumps({"step": step, "response": "x" * 5000}) for step in range(100)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    page = write_report(tmp_path).read_text()
    assert page.count("(5000 characters)") == 40
    assert "x" * 2001 not in page


@pytest.mark.parametrize("steps", [1, 60])
def test_charts_survive_numbers_that_are_not_finite(steps):
    broken = [Entry(entry.step, entry.time, dict.fromkeys(entry.metrics, math.nan)) for entry in history(steps)]
    assert [chart.title for chart in charts(broken)] == ["Time per step"]


def test_smoothing_keeps_a_constant_and_skips_nan():
    assert smooth([2.0] * 100) == [2.0] * 100
    noisy = [2.0] * 100
    noisy[50] = math.nan
    assert smooth(noisy) == [2.0] * 100
