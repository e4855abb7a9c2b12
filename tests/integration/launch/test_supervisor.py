"""The supervisor with real processes: whatever happens, the outcome is right and nothing is left running."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

# Plays the launcher: the real supervisor with shell scripts as roles; prints the outcome.
LAUNCHER = """
import dataclasses, json, os, sys
from pathlib import Path
from minpro_megatron.launch import supervisor

folder, scripts, limit_s = Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
supervisor._TERMINATE_LIMIT_S = limit_s
environment = {**os.environ, "PIDS": str(folder / "pids")}
commands = [
    supervisor.RoleCommand(role, ["sh", "-c", script], environment, stays=role == "serve")
    for role, script in scripts.items()
]
class Stopping:
    # as launch/stopping.py, with the trainer's files in one folder: it writes `saved` there

    def __init__(self, allowed_s):
        self._allowed_s = allowed_s

    def allowed_s(self, signal_name):
        (folder / "stop").touch()
        return self._allowed_s

    def early_end(self, at_once=False):
        end = supervisor.EarlyEnd(policy_version=3, reason="why", saved=True)
        return end if (folder / "saved").exists() else None


stopping = Stopping(float(sys.argv[4])) if len(sys.argv) > 4 else None
outcome = supervisor.Supervisor(commands, folder / "logs", stopping, poll_s=0.03, failures_together_s=0.03).run()
print(json.dumps(dataclasses.asdict(outcome), default=str))
"""
STAY = 'echo $$ >> "$PIDS"; sleep 60 & echo $! >> "$PIDS"; wait'
# A process in a session of its own that ignores SIGTERM, like a torchrun worker stuck in a collective.
STUBBORN = """setsid sh -c 'trap "" TERM; echo $$ >> "$PIDS"; while true; do sleep 0.2; done' & """


class Launched:
    """A launcher process over shell scripts that write their process ids to a file."""

    def __init__(
        self, folder: Path, scripts: dict[str, str], terminate_limit_s: float = 1.0, allowed_s: float | None = None
    ) -> None:
        self.folder = folder
        allowed = [] if allowed_s is None else [str(allowed_s)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(folder), json.dumps(scripts), str(terminate_limit_s), *allowed],
            stdout=subprocess.PIPE,
            text=True,
        )

    def pids(self) -> list[int]:
        path = self.folder / "pids"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait_for_pids(self, count: int) -> list[int]:
        eventually(lambda: len(self.pids()) >= count)
        return self.pids()

    def outcome(self) -> dict[str, Any]:
        """The supervisor's outcome, once it has ended."""
        output, _ = self.process.communicate(timeout=50)
        return json.loads(output)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    made: list[Launched] = []

    def make(scripts: dict[str, str], terminate_limit_s: float = 1.0, allowed_s: float | None = None) -> Launched:
        made.append(Launched(tmp_path, scripts, terminate_limit_s, allowed_s))
        return made[-1]

    yield make
    for one in made:
        for pid in [*one.pids(), one.process.pid]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def eventually(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if is_running(pid)]


def test_a_finished_run_stops_the_servers_and_exits_with_0(launched, tmp_path):
    serve = f"trap 'echo stopped > {tmp_path}/serve; exit 0' TERM; {STAY}"
    run = launched({"serve": serve, "collect": "exit 0", "train": "sleep 0.2; exit 0"})
    outcome = run.outcome()
    assert (outcome["status"], outcome["failures"], outcome["left_behind"]) == (0, [], [])
    assert (tmp_path / "serve").read_text() == "stopped\n"
    assert running(run.pids()) == []


def test_a_failed_role_stops_the_others(launched, tmp_path):
    run = launched({"serve": STAY, "collect": STAY, "train": "echo why; sleep 0.2; exit 3"})
    outcome = run.outcome()
    log_file = tmp_path / "logs" / "train.log"
    assert outcome["status"] == 1
    expected = {"role": "train", "how": "failed with exit status 3", "log_file": str(log_file), "log_start": 0}
    assert outcome["failures"] == [expected | {"first_rank": None, "needs_a_person": False}]
    assert log_file.read_text() == "why\n"
    assert running(run.pids()) == []


@pytest.mark.parametrize("stated", [True, False])
def test_what_a_person_has_to_correct_ends_it_with_2_so_that_no_job_starts_it_again(launched, stated):
    """torchrun ends with 1 whatever its ranks end with: the failure's file says it."""
    failure = {"rank": 0, "host": "h", "time_ns": 1, "message": "its SHA-256 is not", "exit_status": 2}
    write = f"""echo '{json.dumps(failure)}' > "$MINPRO_RANK_FAILURES/rank-0.json" """
    state = f'mkdir -p "$MINPRO_RANK_FAILURES"; {write}; exit 1'
    run = launched({"serve": STAY, "collect": STAY, "train": state if stated else "exit 2"})
    assert run.outcome()["status"] == 2


def test_a_server_that_ends_before_the_others_is_a_failure(launched):
    run = launched({"serve": "exit 0", "collect": STAY, "train": STAY})
    outcome = run.outcome()
    assert outcome["status"] == 1
    assert outcome["failures"][0]["how"].startswith("exited before the others were done")
    assert running(run.pids()) == []


def test_children_of_a_killed_role_are_found_and_killed(launched):
    scripts = {"serve": STUBBORN + STAY, "collect": STAY, "train": STUBBORN + STAY}
    run = launched(scripts, terminate_limit_s=0.3)
    pids = run.wait_for_pids(8)
    children = psutil.Process(run.process.pid).children()
    next(child for child in children if "setsid" in child.cmdline()[-1]).kill()
    outcome = run.outcome()
    assert outcome["status"] == 1
    assert outcome["failures"][0]["how"].startswith("was ended by signal SIGKILL")
    assert running(pids) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_launcher_stops_everything(launched, number):
    run = launched({"serve": STAY, "collect": STAY, "train": STAY})
    pids = run.wait_for_pids(6)
    run.process.send_signal(number)
    outcome = run.outcome()
    assert (outcome["status"], outcome["interrupted_by"]) == (130, number.name)
    assert outcome["failures"] == []
    assert running(pids) == []


@pytest.mark.parametrize("is_told", [False, True])
def test_a_trainer_that_has_saved_ends_the_start(launched, tmp_path, is_told):
    """By its time limit, or because the launcher was asked to stop and allows the time for it."""
    wait = f"until [ -e {tmp_path}/stop ]; do sleep 0.02; done; " if is_told else ""
    train = f"{STAY.removesuffix('wait')} {wait} touch {tmp_path}/saved; exit 0"
    run = launched({"serve": STAY, "collect": STAY, "train": train}, allowed_s=60)
    pids = run.wait_for_pids(6)
    if is_told:
        run.process.send_signal(signal.SIGTERM)
    outcome = run.outcome()
    assert (outcome["status"], outcome["interrupted_by"]) == (75, "SIGTERM" if is_told else None)
    assert outcome["early_end"].startswith("EarlyEnd(policy_version=3, ")
    assert outcome["failures"] == []
    assert running(pids) == []


def test_the_time_for_a_last_checkpoint_ends(launched):
    run = launched({"serve": STAY, "collect": STAY, "train": STAY}, allowed_s=0.3)
    pids = run.wait_for_pids(6)
    run.process.send_signal(signal.SIGINT)
    outcome = run.outcome()
    assert (outcome["status"], outcome["interrupted_by"], outcome["early_end"]) == (130, "SIGINT", None)
    assert running(pids) == []


def test_a_second_signal_ends_the_time_for_a_last_checkpoint(launched, tmp_path):
    run = launched({"serve": STAY, "collect": STAY, "train": STAY}, allowed_s=600)
    pids = run.wait_for_pids(6)
    run.process.send_signal(signal.SIGINT)
    eventually(lambda: (tmp_path / "stop").exists())
    run.process.send_signal(signal.SIGINT)
    assert run.outcome()["status"] == 130
    assert running(pids) == []


def test_a_second_interruption_does_not_wait(launched):
    run = launched({"serve": STUBBORN + STAY, "train": STAY}, terminate_limit_s=60)
    pids = run.wait_for_pids(5)
    run.process.send_signal(signal.SIGINT)
    eventually(lambda: len(running(pids)) < 5)  # it has begun to stop them
    run.process.send_signal(signal.SIGINT)
    assert run.outcome()["status"] == 130
    assert running(pids) == []


def test_roles_end_when_the_launcher_is_killed(launched):
    record = 'echo $$ >> "$PIDS"; exec sleep 60'
    run = launched({"serve": record, "collect": record, "train": record})
    pids = run.wait_for_pids(3)
    run.process.kill()
    eventually(lambda: not running(pids))


def test_processes_that_were_there_before_are_left_alone(tmp_path):
    program = f"""
import subprocess, sys
from minpro_megatron.launch import supervisor
from pathlib import Path
earlier = subprocess.Popen(["sleep", "60"])
command = supervisor.RoleCommand("train", ["sh", "-c", "exit 1"], {{}})
outcome = supervisor.Supervisor([command], Path({str(tmp_path)!r}), poll_s=0.03, failures_together_s=0.03).run()
alive = earlier.poll() is None
earlier.kill()
sys.exit(0 if alive and outcome.status == 1 else 1)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
