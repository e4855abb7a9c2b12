"""A finished run that is launched again: what is missing is written, nothing is started, and the launch succeeds."""

import json
import logging
from pathlib import Path

import pytest

from minpro_megatron.__main__ import main
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.errors import FAILED
from minpro_megatron.launch import launcher
from minpro_megatron.launch.launcher import _conclude
from minpro_megatron.launch.preflight.run_checks import problems
from minpro_megatron.launch.resume import finished_summary
from minpro_megatron.launch.supervisor import Failure, Outcome, Supervisor
from minpro_megatron.monitor.summary import read_summary, write_summary
from minpro_megatron.report import report as report_module
from minpro_megatron.report.run_end import record_end
from tests.support.begun_runs import begin, finish, summary_of
from tests.support.run_examples import save_checkpoint, write_example_files
from tests.support.started_nodes import SLURM, folder, options, roles_started, run_all

__all__ = ["folder", "roles_started"]  # fixtures

HISTORY = json.dumps({"step": 3, "time": 1.0, "metrics": {"reward/mean": 0.5}}) + "\n"


def finished(tmp_path: Path, **changes: object) -> RunConfig:
    """A run that has trained its 4 global steps; its report is missing."""
    write_example_files(tmp_path)
    config = begin(tmp_path, **changes)
    (config.run_dir / "metrics.jsonl").write_text(HISTORY)
    save_checkpoint(config, 4, num_global_steps=4)
    finish(config, 4)
    return config


def launch(config: RunConfig, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """The command `launch` on these settings; it fails where it starts a role."""
    monkeypatch.setattr(launcher, "load_recipe", lambda recipe: config)
    monkeypatch.setattr(Supervisor, "run", lambda *_: pytest.fail("a role was started"))
    return main(["launch", "recipe", *overrides])


@pytest.mark.parametrize("mode", ["delay", "bounded"])
def test_a_finished_run_gets_what_is_missing_and_succeeds(tmp_path, monkeypatch, capsys, mode) -> None:
    config = finished(tmp_path, staleness={"mode": mode})
    before = (config.run_dir / "summary.json").read_text()
    for _ in range(2):
        assert launch(config, monkeypatch) == 0
        shown = capsys.readouterr().out.splitlines()
        assert shown[0] == (
            f"run example: all of its 4 global steps were finished before; files in {config.run_dir}. To repeat it, "
            "give a new name=...; to continue it, raise num_global_steps"
        )
        assert shown[1].startswith("finished 4 global steps (8 updates)")
        assert f"report       {config.run_dir / 'report.html'}" in shown
    assert "not finished" not in (config.run_dir / "report.html").read_text()
    assert (config.run_dir / "summary.json").read_text() == before
    assert not (config.run_dir / "starts").exists()


def test_a_finished_run_needs_neither_its_inputs_nor_free_ports(tmp_path, monkeypatch) -> None:
    config = finished(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    assert problems(config)
    assert launch(config, monkeypatch) == 0


def test_a_finished_measurement_is_reported_again(tmp_path, monkeypatch) -> None:
    config = finished(tmp_path, debug={"trainer": "timer"})
    assert launch(config, monkeypatch) == 0


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed=7", "holds a run with other settings (seed: 0 -> 7)"),
        (
            "num_global_steps=3",
            "num_global_steps = 3: the run in {run_dir} has finished its 4 global steps; give 4 to report its end "
            "again, or more to continue it",
        ),
    ],
)
def test_another_launch_of_a_finished_run_is_refused(tmp_path, monkeypatch, capsys, override, problem) -> None:
    config = finished(tmp_path)
    assert launch(config, monkeypatch, override) == 2
    assert problem.format(run_dir=config.run_dir) in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["delay", "bounded"])
def test_a_finished_run_can_be_made_longer(tmp_path, mode) -> None:
    config = finished(tmp_path, staleness={"mode": mode})
    longer = with_overrides(config, ["num_global_steps=6"])
    assert finished_summary(longer) is None
    assert [problem for problem in problems(longer) if "name =" in problem] == []


def test_a_summary_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys) -> None:
    config = finished(tmp_path)
    (config.run_dir / "summary.json").write_text('{"steps": "four"}')
    assert launch(config, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert f"name = example: {config.run_dir / 'summary.json'} is not a summary of this version" in shown
    assert "remove it to finish the run again from its last checkpoint" in shown


def test_a_missing_export_without_its_checkpoint_is_named(tmp_path, monkeypatch, capsys) -> None:
    config = finished(tmp_path)
    write_summary(config.run_dir, summary_of(config, 4, hf_export=str(config.run_dir / "hf_export")))
    (config.run_dir / "checkpoints" / "step-000004").rename(tmp_path / "elsewhere")
    assert launch(config, monkeypatch) == 2
    assert (
        f"name = example: {config.run_dir / 'hf_export'} is missing, and there is no checkpoint of version 4 to write "
        "it from; put either back, or repeat the run under a new name=..."
    ) in capsys.readouterr().err


def test_all_nodes_of_a_finished_run_succeed(folder, roles_started, capsys) -> None:
    """Also as the third start in a row without a new checkpoint."""
    config = finished(folder)
    given = options(folder, config)
    for restart in range(3):
        assert run_all(given, SLURM | {"SLURM_RESTART_COUNT": str(restart)}) == [0, 0]
    assert roles_started == []
    assert capsys.readouterr().out.count("finished 4 global steps (8 updates)") == 3


def test_a_role_that_fails_after_the_summary_fails_no_run(tmp_path, capsys) -> None:
    config = finished(tmp_path)
    log_file = config.run_dir / "logs" / "train.log"
    log_file.parent.mkdir()
    log_file.write_text("")
    outcome = Outcome(FAILED, [Failure("train", "was ended by signal SIGKILL", log_file)])
    assert _conclude(config, outcome) == 0
    shown = capsys.readouterr()
    assert "the role train was ended by signal SIGKILL" in shown.err
    assert "the run had finished before that" in shown.err
    assert "launch the same command again" not in shown.err
    assert "finished 4 global steps" in shown.out
    (config.run_dir / "summary.json").unlink()
    assert _conclude(config, outcome) == FAILED
    assert "launch the same command again to resume" in capsys.readouterr().err


def test_the_report_of_a_run_is_written_before_its_summary_and_says_that_it_is_finished(tmp_path, monkeypatch) -> None:
    config = finished(tmp_path)
    summary = read_summary(config.run_dir)
    (config.run_dir / "summary.json").unlink()
    seen = []
    monkeypatch.setattr(
        "minpro_megatron.report.run_end.write_summary",
        lambda run_dir, _: seen.append("not finished" in (run_dir / "report.html").read_text()),
    )
    assert summary is not None
    record_end(config.run_dir, summary)
    assert seen == [False]


def test_a_report_that_fails_fails_no_run(tmp_path, monkeypatch, caplog) -> None:
    config = finished(tmp_path)
    summary = read_summary(config.run_dir)
    (config.run_dir / "summary.json").unlink()

    def fail(*_: object) -> str:
        raise ZeroDivisionError("a plot of nothing")

    monkeypatch.setattr(report_module, "render", fail)
    assert summary is not None
    with caplog.at_level(logging.WARNING):
        record_end(config.run_dir, summary)
    assert read_summary(config.run_dir) == summary
    assert "ZeroDivisionError: a plot of nothing" in caplog.text
    assert "Traceback" in caplog.text
