"""Runs that end before their last step with a checkpoint, go on by the same command, and are made longer afterwards."""

import json
import re
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from minpro_megatron.checkpoints.resume_point import read_latest
from tests.e2e.conftest import ROOT, TinyModel
from tests.e2e.crashes import DELAY, PROMPTS, STEPS, CrashRun, Results, differing, make_model

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("early_ends_model"))


@pytest.fixture(scope="module")
def undisturbed(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Results:
    run = CrashRun(model, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    run.finish()
    return Results.read(run.run_dir)


def latest_version(run_dir: Path) -> int | None:
    manifest = read_latest(run_dir)
    return manifest.policy_version if manifest else None


def test_a_run_whose_time_limit_is_shorter_than_its_checkpoint_interval_comes_to_its_end(
    model: TinyModel, undisturbed: Results, tmp_path: Path
) -> None:
    """Three seconds are over before the first global step: each start makes one, saves and ends."""
    limited = ("checkpoint.every_steps=1000", "checkpoint.time_limit_minutes=0.05", "checkpoint.at_end=false")
    run = CrashRun(model, tmp_path, "limited", *limited)
    for version in (1, 2):
        launched = run.launch()
        assert launched.status == 75, f"{launched.output}\n{run.logs()}"
        assert f"ended after global step {version}, with a checkpoint: the time limit leaves -" in launched.output
        assert "launch the same command again to resume" in launched.output
        assert latest_version(run.run_dir) == version
    unlimited = CrashRun(model, tmp_path, "limited", *limited, "checkpoint.time_limit_minutes=0")
    unlimited.finish()
    assert latest_version(run.run_dir) == 2  # it is asked to leave none at its end
    assert differing(Results.read(run.run_dir), undisturbed) == []


def staleness_by_step(run_dir: Path) -> dict[int, set[int]]:
    with closing(sqlite3.connect(f"file:{run_dir / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
        rows = journal.execute("SELECT consumed_step, staleness FROM groups WHERE state = 'consumed'").fetchall()
    found: dict[int, set[int]] = {}
    for step, staleness in rows:
        found.setdefault(step, set()).add(staleness)
    return found


@pytest.mark.parametrize("mode", ["delay", "bounded"])
def test_a_finished_run_has_a_checkpoint_and_is_made_longer(model: TinyModel, tmp_path: Path, mode: str) -> None:
    settings = ("checkpoint.every_steps=4", f"staleness.mode={mode}", "staleness.max_staleness=2")
    run = CrashRun(model, tmp_path, "longer", *settings)
    run.finish()
    assert latest_version(run.run_dir) == STEPS
    more = STEPS + 4
    launched = CrashRun(model, tmp_path, "longer", *settings, f"num_global_steps={more}").finish()
    assert f"it resumes from its checkpoint after global step {STEPS} (start 2 of this run)" in launched.output
    assert ("batches 6 to 7 no longer exist, so version 6 samples them" in launched.output) == (mode == "delay")
    found = staleness_by_step(run.run_dir)
    assert sorted(found) == list(range(more))
    if mode == "delay":
        assert [found[step] for step in range(STEPS, more)] == [{0}, {1}, {DELAY}, {DELAY}]
    else:
        assert all(0 <= value <= 2 for values in found.values() for value in values)
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["groups_consumed"]) == (more, more * PROMPTS)
    assert latest_version(run.run_dir) == more


def test_an_interrupt_saves_where_the_time_is_allowed(model: TinyModel, undisturbed: Results, tmp_path: Path) -> None:
    run = CrashRun(model, tmp_path, "interrupted", "checkpoint.every_steps=1000", "checkpoint.save_on_stop_s=300")
    process = subprocess.Popen(run._command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    metrics = run.run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline, run.logs()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, f"{output}\n{run.logs()}"
    assert "SIGINT: the trainer finishes its global step and saves, for 300 s at most" in output
    (version,) = re.findall(r"ended after global step (\d), with a checkpoint: stopped by SIGINT", output)
    assert latest_version(run.run_dir) == int(version) < STEPS
    run.finish()
    assert differing(Results.read(run.run_dir), undisturbed) == []
