"""Two starts on one run folder whose file system has no locks between machines: the older one ends."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.long_cases import long_after
from tests.support.run_examples import write_example_files

# The launcher as it is, with shell scripts as roles, where flock succeeds for everyone as on a file system whose locks
# hold on one machine only. `host`: the name of the machine that this start believes to be on.
LAUNCH = """
import fcntl, os, socket, sys
fcntl.flock = lambda *_: None
host = sys.argv[3]
socket.gethostname = lambda: host
from functools import partial
from minpro_megatron.launch import launcher, run_folder
from minpro_megatron.launch.supervisor import RoleCommand
from minpro_megatron.run_folder import start_fence
from minpro_megatron.__main__ import main

start_fence.LOOK_EVERY_S, run_folder.TAKE_OVER_S = 0.05, 1.5
launcher.Supervisor = partial(launcher.Supervisor, poll_s=0.03, failures_together_s=0.03)
def stand_ins(config, config_file, incarnation, save_by):
    environment = {**os.environ, "RUN": str(config.run_dir)}
    scripts = {"serve": "exec sleep 60", "collect": sys.argv[2], "train": sys.argv[1]}
    return [RoleCommand(role, ["sh", "-c", script], environment, role == "serve") for role, script in scripts.items()]

launcher.role_commands = stand_ins
sys.exit(main(["launch", "my_recipes:good", "name=other"]))
"""
RECIPES = """
from pathlib import Path
from tests.support.run_examples import example_config

def good():
    return example_config(Path(__file__).parent)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_example_files(tmp_path)
    (tmp_path / "my_recipes.py").write_text(RECIPES)
    return tmp_path


def launch(folder: Path, train: str, collect: str = "exec sleep 60", host: str = "one") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, train, collect, host],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{folder}:."},
    )


def until(condition: Callable[[], bool], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def result(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    try:
        _, error = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, error.splitlines()


def test_the_older_of_two_starts_ends_with_one_line_and_writes_nothing_more(folder: Path) -> None:
    run_dir = folder / "runs" / "other"
    older = launch(folder, "exec sleep 60")
    until((run_dir / "logs" / "train.log").exists)
    newer = launch(folder, "exec sleep 60")
    status, lines = result(older)
    assert lines == [
        f"error: name = other: start 2 of the run (on one) has taken over {run_dir} from this one (start 1), which "
        "stops writing; if both should run, give one of them another name=..."
    ]
    assert status == 2  # a job is not started again for it: the two would take turns
    assert not (run_dir / "report.html").exists()
    assert newer.poll() is None
    newer.terminate()
    result(newer)
    assert json.loads((run_dir / "starts" / "1" / "owner.json").read_text())["host"] == "one"


def test_a_newer_start_on_another_machine_waits_until_the_older_one_has_seen_it(folder: Path) -> None:
    """Its roles begin to write only then."""
    run_dir = folder / "runs" / "other"
    older = launch(folder, 'while true; do date +%s.%N > "$RUN/older"; sleep 0.1; done', host="one")
    until((run_dir / "older").exists)
    newer = launch(folder, 'date +%s.%N > "$RUN/newer"', "exit 0", host="two")
    assert result(older)[0] == 2
    output, _ = newer.communicate(timeout=30)
    assert "start 1 of the run (on one) does not seem to have ended" in output
    assert float((run_dir / "older").read_text()) < float((run_dir / "newer").read_text())


@pytest.mark.parametrize("how", long_after(2, ["removed", "replaced", "renamed"]))
def test_a_run_whose_folder_goes_ends_with_that_reason_and_makes_no_half_folder(folder: Path, how: str) -> None:
    run_dir = folder / "runs" / "other"
    process = launch(folder, "exec sleep 60")
    until((run_dir / "logs" / "train.log").exists)
    moved = run_dir.with_name("moved")
    run_dir.rename(moved)
    if how == "removed":
        shutil.rmtree(moved)
    if how == "replaced":
        shutil.copytree(moved, run_dir)
        owner = run_dir / "starts" / "0" / "owner.json"
        owner.write_text(owner.read_text().replace('"key":"', '"key":"other'))
    status, lines = result(process)
    what = "belongs to another run now" if how == "replaced" else "is gone"
    assert (status, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"error: name = other: {run_dir} {what}")
    assert run_dir.exists() == (how == "replaced")


def test_a_refused_start_does_not_end_the_one_that_runs(folder: Path) -> None:
    run_dir = folder / "runs" / "other"
    process = launch(folder, "sleep 1", "exit 0")
    until((run_dir / "logs" / "train.log").exists)
    os.makedirs(run_dir / "starts" / "1")  # as node 0 makes it before it looks at anything else
    status, lines = result(process)
    assert "taken" not in "\n".join(lines)
    assert status == 1  # it says nothing of its results, as a stand-in does
