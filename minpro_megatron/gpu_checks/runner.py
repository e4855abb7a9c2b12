"""Runs each check as a process of its own under its own time limit. This file imports no torch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from minpro_megatron.errors import RunFailed
from minpro_megatron.gpu_checks.record import CheckResult
from minpro_megatron.gpu_checks.registry import START_S, Check

_LAST_LINES = 15
_MACHINE_S = 300.0
# The limits are for a machine with a GPU. On a CPU only the logic of the checks is tried, perhaps on a busy machine.
_PATIENCE_ON_CPU = 5
ONE_CHECK = (sys.executable, "-m", "minpro_megatron.gpu_checks.one_check")


def facts_of_machine() -> dict[str, str]:
    """What machine.py reports, from a process of its own. Raises RunFailed if that process fails."""
    command = [sys.executable, "-m", "minpro_megatron.gpu_checks.machine"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_MACHINE_S)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"the machine's torch did not start in {_MACHINE_S:.0f} s") from None
    try:
        return json.loads(found.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        reason = (found.stderr.strip().splitlines() or [f"exit status {found.returncode}"])[-1]
        raise RunFailed(f"the machine's torch cannot be examined: {reason}") from None


def run_checks(
    checks: Sequence[Check],
    device: str,
    small: bool,
    budget_s: float,
    ended: Callable[[CheckResult], None],
    progress: Callable[[str], None],
    program: Sequence[str] = ONE_CHECK,
) -> list[CheckResult]:
    """The results of the checks, one after the other. `ended` gets each result when its check ends, `progress` a line
    before each check starts. A check that crashes or exceeds its limit does not keep the others from running; one for
    which less than the start of a process is left of `budget_s` is skipped."""
    start = time.monotonic()
    results = []
    for index, check in enumerate(checks):
        left = budget_s - (time.monotonic() - start)
        progress(f"{index + 1} of {len(checks)}: {check.name}, about {check.expected_s:.0f} s; {left:.0f} s are left")
        if left < START_S:
            reason = f"only {max(0.0, left):.0f} s of the budget of {budget_s:.0f} s were left"
            result = CheckResult(check.name, "skipped", 0.0, check.limit_s, problems=[reason])
        else:
            limit_s = check.limit_s * (_PATIENCE_ON_CPU if device == "cpu" else 1)
            result = _run(check, device, small, min(limit_s, left), program)
        ended(result)
        results.append(result)
    return results


def _run(check: Check, device: str, small: bool, limit_s: float, program: Sequence[str]) -> CheckResult:
    with TemporaryDirectory(prefix="gpu-check-") as folder:
        result_file, log_file = Path(folder, "result.json"), Path(folder, "output.log")
        command = [*program, check.name, "--device", device, "--folder", folder, "--result", str(result_file)]
        start = time.monotonic()
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command + ["--small"] * small,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # with the processes that it starts it is ended as one group
            )
            try:
                ending = f"it ended with exit status {process.wait(limit_s)} and no result"
            except subprocess.TimeoutExpired:
                ending = f"it did not end in {limit_s:.0f} s"
            finally:
                _end_group(process)
        seconds = time.monotonic() - start
        if (result := _read(result_file)) is not None:
            return CheckResult(**{**result, "seconds": round(seconds, 2), "limit_s": limit_s})
        lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        problems = [ending, *(line[:300] for line in lines[-_LAST_LINES:])]
        return CheckResult(check.name, "error", round(seconds, 2), limit_s, problems=problems)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the process was ended before, or while, it wrote
        return None


def _end_group(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
