"""Runs side by side: what counts of each, where they differ, what bad input does, and hostile names."""

import json
import math
import re
from pathlib import Path

import pytest

from minpro_megatron.commands.compare import main
from minpro_megatron.config.run import with_overrides
from minpro_megatron.monitor.history import Entry, encode_entry
from minpro_megatron.report.comparison import differing_settings, read_runs
from minpro_megatron.report.run_history import figures_of, valid_history
from tests.support.report_pages import NASTY, assert_safe
from tests.support.run_examples import example_config


def accuracies(*values: float, first_step: int = 0, at: float = 100.0) -> list[Entry]:
    return [
        Entry(first_step + place, at + place, {"reward/accuracy": value, "reward/mean": 10 * value, "time/step_s": 2.0})
        for place, value in enumerate(values)
    ]


def make_run(folder: Path, entries: list[Entry], *overrides: str, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    config = with_overrides(example_config(folder.parent), [f"name={folder.name}", *overrides])
    (folder / "run.json").write_text(config.to_json())
    (folder / "metrics.jsonl").write_text("".join(map(encode_entry, entries)))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def compare(tmp_path: Path, *arguments: object) -> str:
    path = tmp_path / "page.html"
    assert main([*map(str, arguments), "--output", str(path)]) == 0
    return path.read_text()


def texts(page: str) -> str:
    """The texts of a page's elements, with one space between them."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_of_many_runs_each_is_a_row(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"run{number}", accuracies(*[0.5] * number)) for number in range(1, 6)]
    text = texts(compare(tmp_path, *folders))
    assert "run global steps held-out pass@1 held-out mean reward training accuracy" in text
    assert "run3 3 - - 50.0 % best 50.0 % at step 0" in text


def test_runs_of_different_length_and_state_stand_in_one_page(tmp_path: Path) -> None:
    evaluated = [
        Entry(0, 1.0, {"eval/pass_at_1": 0.25, "eval/mean_reward": -0.5}),
        Entry(4, 200.0, {"eval/pass_at_1": 0.5, "eval/mean_reward": 0.125}),
    ]
    whole = make_run(tmp_path / "whole", [*accuracies(0.1, 0.2, 0.3, 0.4), *evaluated])
    short = make_run(tmp_path / "short", accuracies(0.5), "objective.name=gspo", "seed=3", finished=False)
    (short / "alarms.jsonl").write_text('{"step": 0, "name": "a"}\n{"step": 1, "name": "b"}\n{"st')
    outline = assert_safe(page := compare(tmp_path, whole, short))
    assert outline.elements["svg"] == 5  # pass@1 and accuracy, mean rewards, time
    text = texts(page)
    for row in (  # the figures of both runs
        "global steps 4 1 of 4", "held-out pass@1 50.0 % best 50.0 % at version 4 -", "held-out mean reward 0.125 -",
        "training accuracy 25.0 % best 25.0 % at step 3 50.0 % best 50.0 % at step 0", "collapsed no no",
        "time 8 s 2.00 s per step 2 s 2.00 s per step", "alarms 0 2",
    ):  # fmt: skip
        assert row in text
    assert "objective.name minpro gspo" in text
    assert "seed 0 3" in text
    assert "optimizer.learning_rate" not in page


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", []), make_run(tmp_path / "b", [], "batch.num_prompts=6", "objective.name=gspo")]
    found = dict(differing_settings(read_runs(folders)))
    assert found.pop("batch.num_prompts") == ["4", "6"]
    assert found.pop("objective.name") == ["minpro", "gspo"]
    assert all(name.startswith("objective.") for name in found)  # each has settings of its own


def test_a_run_of_an_older_version_has_the_defaults_of_what_it_did_not_know(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "new", []), make_run(tmp_path / "old", []), make_run(tmp_path / "none", [])]
    old = json.loads((folders[1] / "run.json").read_text())
    del old["optimizer"], old["staleness"]["mode"]
    old["optimizer"] = {"learning_rate": 1}
    (folders[1] / "run.json").write_text(json.dumps(old))
    (folders[2] / "run.json").unlink()
    runs = read_runs(folders)
    assert [name for name, _ in differing_settings(runs)] == ["optimizer.learning_rate"]
    assert [values[2] for _, values in differing_settings(runs)] == ["-"]
    assert [run.label for run in runs if not run.settings] == ["none"]


def test_steps_that_a_run_went_back_on_do_not_count(tmp_path: Path) -> None:
    """It was at step 5, went back to version 2, and is at step 3 again: of the first attempt, 0 and 1 are left."""
    first = [*accuracies(0.1, 0.1, 0.9, 0.9, 0.9, 0.9), Entry(4, 150.0, {"eval/pass_at_1": 0.9})]
    second = accuracies(0.2, 0.3, first_step=2, at=500.0)
    early = Entry(0, 99.0, {"eval/pass_at_1": 0.4})
    folder = make_run(tmp_path / "back", [early, *first, *second])
    history = valid_history(folder)
    assert [(entry.step, entry.metrics.get("reward/accuracy")) for entry in history if entry.is_global_step] == [
        (0, 0.1), (1, 0.1), (2, 0.2), (3, 0.3),
    ]  # fmt: skip
    found = figures_of(history)
    assert (found.num_steps, found.held_out) == (4, 0.4)
    assert found.total_s == 8.0


def test_a_collapse_is_where_the_accuracy_falls_below_half_of_its_best_for_good() -> None:
    rise = [0.1 * place for place in range(9)]  # to 0.8
    dip = [0.0] * 8 + [0.8] * 12  # below half for a while, and back
    end = [0.0] * 10
    assert figures_of(accuracies(*rise)).collapsed_at is None
    assert figures_of(accuracies(*rise, *dip)).collapsed_at is None
    found = figures_of(accuracies(*rise, *dip, *end))
    best = found.best_accuracy
    assert best is not None
    assert best[0] == pytest.approx(0.8)
    # means of ten steps: 0.8 until step 28, then a tenth of it less with every step
    assert found.collapsed_at == 28 + 6
    assert figures_of([]).collapsed_at is None


def test_what_is_not_finite_is_no_best_and_no_end() -> None:
    found = figures_of(accuracies(0.5, math.nan, 0.25, math.nan))
    assert (found.num_steps, found.accuracy, found.best_accuracy) == (4, 0.375, (0.5, 0))
    nothing = figures_of([Entry(0, 1.0, {"eval/pass_at_1": math.nan})])
    assert (nothing.best_held_out, nothing.accuracy, nothing.mean_staleness, nothing.step_s) == (None, None, None, None)


def test_asked_for_metrics_are_drawn_with_the_asked_for_mean(tmp_path: Path) -> None:
    entries = [Entry(step, 1.0 + step, {"ratio/max": float(step % 2), "ratio/min": 0.5}) for step in range(6)]
    folder = make_run(tmp_path / "a", entries)
    page = compare(tmp_path, folder, "--metrics", "ratio/min, ratio/max,ratio/min", "--smooth", "3")
    assert page.index("<h3>ratio/min") < page.index("<h3>ratio/max")
    assert assert_safe(page).elements["svg"] == 2
    assert page.count("opacity: 0.25") == 2  # the values behind their mean
    assert "opacity: 0.25" not in compare(tmp_path, folder, "--metrics", "ratio/max", "--smooth", "1")


def test_more_runs_than_colors_are_distinguished(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"run-{n}", accuracies(0.1, 0.2, 0.3)) for n in range(11)]
    page = compare(tmp_path, *folders, "--metrics", "reward/accuracy")
    assert page.count("stroke-dasharray") == 1


def test_runs_of_one_name_are_called_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / place / "demo", accuracies(0.5)) for place in ("one", "two")]
    assert [run.label for run in read_runs(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize("nasty", NASTY)
def test_names_and_settings_cannot_get_into_the_page(tmp_path: Path, nasty: str) -> None:
    folders = [make_run(tmp_path / name, accuracies(0.5)) for name in ("a", "b")]
    for place, folder in enumerate(folders):
        settings = {"name": nasty + str(place), "seed": nasty * (place + 1), nasty: place, "data": {nasty: "x" * 10**6}}
        (folder / "run.json").write_text(json.dumps(settings))
        (folder / "metrics.jsonl").write_text(encode_entry(Entry(0, 1.0, {nasty: 1.0, "reward/accuracy": 0.5})))
    page = compare(tmp_path, *folders)
    assert_safe(page)
    assert len(page) < 200_000
    assert_safe(compare(tmp_path, *folders, f"--metrics={nasty}" if "," not in nasty else "--metrics=reward/accuracy"))


def test_damaged_files_of_a_run_do_not_end_the_tool(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", accuracies(0.5, 0.6), finished=False)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\nnull\n[1]\n{"step": 2, "time": 3, "metr')
    (folder / "run.json").write_bytes(b"\xff{")
    (folder / "alarms.jsonl").write_bytes(b"\xff\n[]\n" + b"[" * 100_000)
    page = compare(tmp_path, folder)
    assert_safe(page)
    assert "1 run compared" in page
    assert "global steps 2 of ?" in texts(page)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{tmp}/absent"], "error: {tmp}/absent: there is no such folder; give run folders, such as runs/demo"),
        (
            ["{tmp}/empty"],
            "error: {tmp}/empty: it contains no metrics.jsonl: it is not a run folder, or the run has not",
        ),
        (["{tmp}/a", "{tmp}/../{name}/a"], "error: {tmp}/../{name}/a: given twice; name each run once"),
        (["{tmp}/begun"], "error: none of the 1 runs has written a metric yet; wait for their first global step"),
        (
            ["{tmp}/a", "--metrics", "reward/acuracy"],
            "error: --metrics: none of the runs has 'reward/acuracy'; did you",
        ),
        (["{tmp}/a", "--output", "{tmp}/absent/page.html"], ""),
    ],
)
def test_bad_input_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    make_run(tmp_path / "a", accuracies(0.5))
    make_run(tmp_path / "begun", [])
    (tmp_path / "empty").mkdir()
    places = {"tmp": str(tmp_path), "name": tmp_path.name}
    given = [argument.format(**places) for argument in arguments]
    output = [] if "--output" in given else ["--output", str(tmp_path / "page.html")]
    status = main([*given, *output])
    if not line:  # the folder is made
        assert status == 0
        assert (tmp_path / "absent" / "page.html").is_file()
        return
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(line.format(**places))
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: RUN"),
        (["a", "--smooth", "0"], "--smooth: '0' is not a whole number above 0"),
        (["a", "--smooth", "-1"], "--smooth: '-1' is not a whole number above 0"),
        (["a", "--metrics", " , "], "--metrics: there is no metric in it"),
        (["a", "--output", "runs/demo/metrics.jsonl"], "it must end in .html"),
    ],
)
def test_wrong_options_are_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
