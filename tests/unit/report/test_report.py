"""The summary's round trip and the report: complete, self-contained and safe to open."""

import json
import math
import re

import msgspec
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minpro_megatron.config.run import with_overrides
from minpro_megatron.metrics.declared import METRICS
from minpro_megatron.monitor.history import Entry
from minpro_megatron.monitor.samples import write_samples
from minpro_megatron.monitor.summary import read_summary, summarize, write_summary
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.records import CollectorTotals, EvaluationResult
from minpro_megatron.report.figures import COLORS, VARIABLES, Series, drawing, dressed, picture, smooth
from minpro_megatron.report.pages import KEPT
from minpro_megatron.report.report import write_report
from minpro_megatron.report.run_charts import CHARTS, charts
from minpro_megatron.report.settings import described
from minpro_megatron.report.shown_samples import color_of
from minpro_megatron.terminal_text import visible
from tests.support.report_pages import HOSTILE, NASTY, Outline, assert_safe, history, write_entries, write_run
from tests.support.run_examples import example_config


def evaluation(version: int, pass_at_1: float) -> EvaluationResult:
    return EvaluationResult(
        policy_version=version, pass_at_1=pass_at_1, standard_error=0.0125,
        mean_reward=2 * pass_at_1 - 1, not_graded=3, num_prompts=16, samples_per_prompt=8,
        mean_response_tokens=5.5, wall_time_s=1.0,
    )  # fmt: skip


def totals(*evaluations: EvaluationResult) -> CollectorTotals:
    return CollectorTotals(
        groups_issued=16, groups_consumed=15, groups_dropped=1, groups_not_graded=1,
        smallest_staleness=0, largest_staleness=2, versions_published=5, evaluations=list(evaluations),
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


def test_a_failed_evaluation_is_not_replaced_by_that_of_another_version(tmp_path):
    without_first = example_summary(tmp_path, evaluation(2, 0.25), evaluation(4, 0.5))
    assert (without_first.pass_at_1_before, without_first.pass_at_1_after) == (None, 0.5)
    without_last = example_summary(tmp_path, evaluation(0, 0.25), evaluation(2, 0.5))
    assert (without_last.pass_at_1_before, without_last.pass_at_1_after) == (0.25, None)


def report_with(folder, samples):
    write_samples(folder, samples)
    return write_report(folder)


def test_the_summary_survives_its_file(tmp_path):
    assert read_summary(tmp_path) is None
    summary = example_summary(tmp_path, evaluation(4, 0.5), evaluation(0, 0.125))
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    assert (summary.pass_at_1_before, summary.pass_at_1_after) == (0.125, 0.5)
    assert (summary.mean_reward_before, summary.mean_reward_after, summary.groups_not_graded) == (-0.75, 0.0, 1)
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
    outline = assert_safe(page)
    assert outline.elements["svg"] == 6  # accuracy, ratio, staleness, entropy, time per step, publication
    assert [heading for heading in ("Reward", "Off-policyness", "Objective") if f">{heading}</h2>" in page] == [
        "Reward", "Off-policyness",
    ]  # fmt: skip
    assert "num_global_steps" in page


def test_every_chart_draws_metrics_that_are_declared():
    """A misspelt name would never be drawn."""
    metrics = {re.sub("<.*", member, name): 0.5 for name in METRICS for member in "12"}
    entries = [Entry(step, 100.0 + step, metrics) for step in range(2)]
    for _, title, _, draw in CHARTS:
        assert draw(Figure().add_axes((0, 0, 1, 1)), entries), title
    titles = [title for _, title, _, _ in CHARTS]
    assert len({*titles}) == len(titles)


def test_colors_follow_the_page():
    assert {*COLORS} <= VARIABLES.keys()
    svg = picture(lambda axes: bool(axes.plot([1, 2], color=COLORS[0], label="a")))
    assert svg is not None
    assert "var(--blue)" in svg
    assert not re.search("#[0-9a-f]{6}", svg)


def test_all_phases_are_listed_with_their_share_and_longest_step(tmp_path):
    entries = [
        Entry(0, 1.0, {"time/train_s": 1.0, "time/step_s": 4.0}),
        Entry(1, 2.0, {"time/train_s": 5.0, "time/step_s": 8.0}),
    ]
    write_run(tmp_path, entries)
    outline = Outline(write_report(tmp_path).read_text())
    assert re.search(r"train\s*6.0 s\s*50 %\s*3.00 s\s*5.00 s", outline.text)


def test_the_time_of_a_resumed_run_is_that_of_all_its_starts(tmp_path):
    """The summary has the time of the last start."""
    times = {"time/train_s": 300.0, "time/step_s": 400.0}
    write_run(tmp_path, [Entry(step, float(step), times) for step in range(4)])
    text = Outline(write_report(tmp_path, example_summary(tmp_path, evaluation(4, 0.5))).read_text()).text
    assert re.search(r"Time of the global steps\s*26 min 40 s\s*400.0 s per step, without starts", text)
    assert re.search(r"train\s*20 min 00 s\s*75 %", text)


def test_settings_that_were_changed_come_first_with_what_they_were(tmp_path):
    write_run(tmp_path, [])
    changed = ["objective.name=gspo", "staleness.delay_steps=7", "data.min_pass_rate=0.25"]
    (tmp_path / "run.json").write_text(with_overrides(example_config(tmp_path), changed).to_json())
    text = Outline(write_report(tmp_path).read_text()).text
    found = re.search(r"changed from the default \d+(.*?)\s+run \d+\s", text, re.DOTALL)
    assert found
    first = found.group(1)
    assert re.search(r"staleness.delay_steps\s*7 instead of 2", first)
    assert re.search(r"objective.name\s*gspo instead of minpro", first)
    assert re.search(r"data.min_pass_rate\s*0.25", first)
    assert "model.hf_path" in first  # has no default
    assert "optimizer.beta1" not in first
    assert "objective.clip_low" not in first  # the default of this objective
    assert "optimizer.beta1" in text


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_setting_of_a_run_is_described(objective, tmp_path):
    settings = with_overrides(example_config(tmp_path), [f"objective.name={objective}"]).model_dump(mode="json")
    found = [setting for section in described(settings).values() for setting in section]
    assert "objective.aggregation" in {setting.name for setting in found}
    assert [setting.name for setting in found if not setting.description] == []


def test_a_setting_of_another_version_is_shown_and_breaks_nothing(tmp_path):
    sections = described({"name": "old", "objective": {"name": "gone", "power": 3}, "sorcery": {"level": [1]}})
    assert [(s.name, s.value, s.is_changed) for found in sections.values() for s in found] == [
        ("name", "old", True), ("objective.name", "gone", True), ("objective.power", 3, True),
        ("sorcery.level", [1], True),
    ]  # fmt: skip
    (tmp_path / "run.json").write_text('{"objective": 3, "staleness": [], "model": "x", "name": {"a": 1}}')
    (tmp_path / "summary.json").write_text('{"name": "of another version"}')
    assert_safe(write_report(tmp_path).read_text())


def test_alarms_are_listed_before_the_curves(tmp_path):
    write_run(tmp_path, [Entry(0, 1.0, {"reward/accuracy": 0.5})])
    alarm = {"step": 12, "name": "entropy_collapse", "seen": "entropy 0.01 nats", "remedy": "explore more", "time": 1.0}
    lines = [json.dumps(alarm), json.dumps({"step": 13, "name": "other", "line": HOSTILE}), '{"step": 14, "na']
    (tmp_path / "alarms.jsonl").write_text("\n".join(lines))
    page = write_report(tmp_path).read_text()
    text = assert_safe(page).text
    assert (
        text.index("step 12 · entropy_collapse")
        < text.index("entropy 0.01 nats")
        < text.index("Rollouts were sampled by earlier")
    )
    assert "Try: explore more" in text
    assert HOSTILE in text


def test_steps_that_a_run_went_back_on_are_not_drawn(tmp_path):
    """It was at step 4, and after a crash is at step 1 again."""
    write_run(
        tmp_path, [*history(5), Entry(0, 200.0, {"reward/accuracy": 1.0}), Entry(1, 201.0, {"reward/accuracy": 1.0})]
    )
    assert "2 of 4" in Outline(write_report(tmp_path).read_text()).text


def test_a_run_without_metrics_or_settings_still_has_a_report(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "has written no metrics" in page
    assert "not finished" in page


def test_hostile_text_is_shown_as_text(tmp_path):
    write_run(tmp_path, [])
    sample = {"step": 1, "prompt": "1+1=", "response": HOSTILE, HOSTILE: 1.0}
    page = report_with(tmp_path, [sample]).read_text()
    assert_safe(page)
    assert page.count("&lt;script&gt;") == 2


@pytest.mark.parametrize("nasty", NASTY)
def test_nothing_that_comes_from_outside_gets_into_the_pages_structure(tmp_path, nasty):
    settings = {"name": nasty, "seed": nasty, nasty: {nasty: nasty}, "model": {"hf_path": nasty}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    (tmp_path / "environment.json").write_text(json.dumps({nasty: nasty}))
    names = [f"evaluation/accuracy/{nasty}", "evaluation/accuracy/b", "eval/pass_at_1"]  # two: there is a legend
    write_entries(tmp_path, [Entry(step, 1.0 + step, dict.fromkeys(names, 0.5)) for step in range(3)])
    tokens = {"tokens": [nasty, 3, nasty], "ratios": [0.5, None, "2"]}
    samples = [{"step": nasty, nasty: nasty, "response": nasty}, {"response": nasty} | tokens]
    outline = assert_safe(report_with(tmp_path, samples).read_text(encoding="utf-8"))
    assert outline.text.count(visible(nasty, keep=KEPT)) >= 8
    assert "49" not in outline.text


def test_a_megabyte_of_text_does_not_make_a_megabyte_of_report(tmp_path):
    large = "<b>" * 350_000
    (tmp_path / "run.json").write_text(json.dumps({"name": large, "data": {"instruction": large}, large: 1}))
    sample = {"response": large, "prompt": large, "tokens": ["<b>" * 700] * 5000, "ratios": [2.0] * 5000, large: large}
    page = report_with(tmp_path, [sample, {"response": large}]).read_text()
    assert len(page) < 2_000_000
    assert "(4000 more tokens)" in page
    assert_safe(page)


def test_tokens_are_colored_by_their_ratio(tmp_path):
    write_run(tmp_path, [])
    sample = {"response": "unused", "tokens": ["one", "two", "three", "\n"], "ratios": [1.0, 0.5, 9.0, None]}
    page = report_with(tmp_path, [sample]).read_text()
    assert '<span class="t " title="ratio 1">one</span>' in page
    assert '<span class="t low3" title="ratio 0.5">two</span>' in page
    assert '<span class="t high4" title="ratio 9">three</span>' in page
    assert '<span class="t " title="no ratio">↵\n</span>' in page
    assert "unused" not in page


@pytest.mark.parametrize(
    ("ratio", "color"),
    [
        (1.0, ""),
        (1.019, ""),
        (1.03, "high1"),
        (0.97, "low1"),
        (1.2, "high2"),
        (0.89, "low2"),
        (0.22, "low4"),
        (1e30, "high4"),
    ],
)
def test_colors_are_stronger_the_farther_a_ratio_is_from_one(ratio, color):
    assert color_of(ratio) == color


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
    assert charts(broken) == []


@pytest.mark.parametrize(("kinds", "is_shown"), [(["plain"], False), (["plain", "prefixed"], True)])
def test_kinds_of_prompts_are_shown_where_there_are_two(kinds, is_shown):
    metrics = {f"reward/accuracy_by_prompt/{kind}": 0.5 for kind in kinds}
    found = [chart.title for chart in charts([Entry(step, 1.0, metrics) for step in range(3)])]
    assert found == (["By kind of prompt"] if is_shown else [])


def test_smoothing_keeps_a_constant_and_skips_nan():
    assert smooth([2.0] * 100) == [2.0] * 100
    noisy = [2.0] * 100
    noisy[50] = math.nan
    assert smooth(noisy) == [2.0] * 100


@pytest.mark.parametrize("largest", [0.0125, -0.0125, 0.25, 12345.0])
def test_the_unit_beside_the_numbers_of_an_axis_is_inside_the_picture(largest: float) -> None:
    data = Series([0, 1], [0.0, largest])
    drawn = []

    def draw(axes: Axes) -> bool:
        drawn.append(axes)
        axes.plot(data.steps, data.values)
        return dressed(axes, [data], "plain", "nats")

    with drawing():
        assert picture(draw) is not None
        assert drawn[0].yaxis.label.get_window_extent().x0 >= 0
