"""The runner: checks that crash, hang or end well, one after the other, and the budget of all of them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from minpro_megatron.gpu_checks.record import CheckResult
from minpro_megatron.gpu_checks.registry import START_S, Check
from minpro_megatron.gpu_checks.runner import run_checks

ROOT = Path(__file__).resolve().parents[3]
# In place of one_check.py: a check is named after what its process does.
PROGRAM = """
import json, os, subprocess, sys, time
name, result = sys.argv[1], sys.argv[sys.argv.index("--result") + 1]
print("begun", name, flush=True)
if name == "crashes":
    os.abort()
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    time.sleep(600)
if name == "writes half a result":
    open(result, "w").write('{"check": ')
    sys.exit(0)
json.dump({"check": name, "verdict": "passed", "seconds": 0, "limit_s": 0, "figures": {"small": "--small" in sys.argv}},
          open(result, "w"))
if name == "hangs at its end":
    time.sleep(600)
"""


def checks(*names: str, limit_s: float = 20.0) -> list[Check]:
    return [Check(name, "", "none", expected_s=1, limit_s=limit_s) for name in names]


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "program.py").write_text(PROGRAM)
    return (sys.executable, str(tmp_path / "program.py"))


def test_a_crash_and_a_hang_are_results_and_the_next_check_runs(program: tuple[str, ...]) -> None:
    ended: list[CheckResult] = []
    progress: list[str] = []
    chosen = [
        *checks("crashes", "writes half a result"),
        *checks("hangs", "hangs at its end", limit_s=2),
        *checks("ends well"),
    ]
    results = run_checks(chosen, "cuda", True, 100, ended.append, progress.append, program)
    assert [result.verdict for result in results] == ["error", "error", "error", "passed", "passed"]
    assert ended == results
    crash, half, hang, late, well = results
    assert crash.problems == ["it ended with exit status -6 and no result", "begun crashes"]
    assert half.problems[0] == "it ended with exit status 0 and no result"
    assert hang.problems[:2] == ["it did not end in 2 s", "begun hangs"]
    child = int(hang.problems[2].split()[1])
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the processes of a check that is ended are ended with it"
        time.sleep(0.05)
    assert 2 <= late.seconds < 10
    assert well.figures == {"small": True}
    assert well.limit_s == 20
    assert progress[0].startswith("1 of 5: crashes, about 1 s; 100 s are left")
    assert json.loads(well.as_line())["verdict"] == "passed"


def test_what_does_not_fit_the_budget_is_skipped_with_the_reason(program: tuple[str, ...]) -> None:
    results = run_checks(
        checks("ends well"), "cuda", True, START_S - 1, lambda result: None, lambda line: None, program
    )
    assert [result.verdict for result in results] == ["skipped"]
    assert results[0].problems[0].endswith(f"of the budget of {START_S - 1:.0f} s were left")


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minpro_megatron", "gpu-check", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = gpu_check()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gpu-check: there is no GPU here")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "error: --device cpu: full shapes would take hours there; add --small\n"),
        (
            ["--only", "logprobs"],
            "error: --only logprobs: there is no such check (did you mean log_probs?); known: log_probs",
        ),
        (["--budget", "-1"], "error: argument --budget: '-1' is not a number above 0"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    done = gpu_check(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(message)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_check_runs_on_a_cpu_from_the_command_to_the_record(tmp_path: Path) -> None:
    done = gpu_check("--device", "cpu", "--small", "--budget", "3600", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["check"]: line["verdict"] for line in map(json.loads, done.stdout.splitlines())}
    skipped = {name for name, verdict in found.items() if verdict == "skipped"}
    assert skipped == {"optimizer_offload", *(name for name in found if name.startswith("te_"))}
    assert set(found.values()) == {"passed", "skipped"}
    record = json.loads((tmp_path / "gpu_checks.json").read_text())
    assert [result["check"] for result in record["results"]] == list(found)
    assert record["device"] == "cpu"
    assert "| `log_probs` | passed |" in (tmp_path / "gpu_checks.md").read_text()
