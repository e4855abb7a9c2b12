"""Runs of the whole system whose processes are killed at random moments: `make test-chaos`.

Not collected by `make test`. Each run is made of a seed: how many kills, of which processes, at which moments, and the
staleness mode. What is found goes into chaos_result.md run by run, so an interrupted series can be continued
(`make test-chaos RESUME=1`). CHAOS_RUNS is the number of runs (default 100).
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from minpro_megatron.monitor.environment import git_commit
from tests.e2e.conftest import ROOT, TinyModel
from tests.e2e.crash_cases import BOUNDED_MODE
from tests.e2e.crash_checks import check_bounded, model, undisturbed
from tests.e2e.crash_table import Table
from tests.e2e.crashes import CrashRun, Launched, Results, differing, processes_of

__all__ = ["model", "undisturbed"]  # fixtures

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

NUM_RUNS = int(os.environ.get("CHAOS_RUNS", "100"))
MAX_KILLS = 4  # of one run
SPAN_S = (
    60.0  # kills come within this time after a launch; an undisturbed run takes about half of it on a quiet machine
)
LAUNCH_LIMIT_S = 600
BOUNDED_SHARE = 0.25
# The words that the command lines of a role's processes hold.
VICTIMS: dict[str, tuple[str, ...]] = {
    "launcher": ("minpro_megatron", "launch"),
    "serve": ("minpro_megatron", "serve"),
    "collect": ("minpro_megatron", "collect"),
    "trainer": ("torch.distributed.run",),
    "a rank": ("minpro_megatron", "train", "--incarnation"),
    "a server": ("minpro_megatron.reference_engine",),
    "everything": (),
}
TABLE = Table(
    path=Path(__file__).with_name("chaos_result.md"),
    title="# Runs whose processes were killed at random moments",
    text=f"""\
Written by `make test-chaos` (tests/e2e/chaos.py). Each run is the run of crash_matrix_result.md; its seed decides the
staleness mode and up to {MAX_KILLS} kills by SIGKILL, each of one role, one rank, one server or everything at once
(`everything` is what a power cut of the machine does to processes), at a random moment within {SPAN_S:.0f} s after a
launch. `kills` names the victims and the seconds after the launch; a victim that was not there at that moment is left
out. The command is launched again until it ends with status 0, and the last launch is never disturbed. `statuses` are
those of the launches. `equal` means equal to an undisturbed run, bit for bit, in all that crash_matrix_result.md lists;
`bounded` what it means there.""",
    columns=("seed", "kills", "statuses", "result", "seconds", "commit"),
)


@dataclass(frozen=True)
class Kill:
    victim: str
    after_s: float  # the launch


def plan_of(seed: int) -> tuple[tuple[str, ...], list[Kill]]:
    """(overrides, one kill for each launch that is disturbed) of the run with this seed."""
    rng = random.Random(seed)
    overrides = BOUNDED_MODE if rng.random() < BOUNDED_SHARE else ()
    kills = [Kill(rng.choice(list(VICTIMS)), rng.uniform(0, SPAN_S)) for _ in range(rng.randint(1, MAX_KILLS))]
    return overrides, kills


@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_a_run_ends_well_whatever_is_killed(seed: int, model: TinyModel, undisturbed: Results, tmp_path: Path) -> None:
    recorded = TABLE.read()
    if os.environ.get("CHAOS_RESUME") and str(seed) in recorded:
        pytest.skip("recorded")
    overrides, kills = plan_of(seed)
    run = CrashRun(model, tmp_path, f"chaos-{seed}", *overrides)
    done: list[str] = []
    launches: list[Launched] = []
    for kill in kills:
        launches.append(run.launch(timeout_s=LAUNCH_LIMIT_S, meanwhile=_killing(kill, seed, done)))
    launches.append(run.finish())
    if overrides:
        check_bounded(run.run_dir, undisturbed)
    else:
        assert differing(Results.read(run.run_dir), undisturbed) == []
    row = {
        "seed": str(seed),
        "kills": ", ".join(done) or "none",
        "statuses": ", ".join(str(launched.status) for launched in launches),
        "result": "bounded" if overrides else "equal",
        "seconds": f"{sum(launched.seconds for launched in launches):.0f}",
        "commit": git_commit(ROOT)[:7],
    }
    TABLE.write(recorded | {str(seed): row}, [str(one) for one in range(NUM_RUNS)])


def _killing(kill: Kill, seed: int, done: list[str]) -> Callable[[psutil.Process, str], None]:
    """What is done while a launch runs: the kill, if the launch lasts that long; `done` gets its line."""

    def meanwhile(launcher: psutil.Process, mark: str) -> None:
        deadline = time.monotonic() + kill.after_s
        while time.monotonic() < deadline:
            if not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.05)
        found = [process for process in processes_of(mark) if _is(kill.victim, _words(process))]
        if kill.victim != "everything" and found:
            found = [random.Random(seed).choice(sorted(found, key=lambda process: process.pid))]
        for process in found:
            process.kill()
        if found:
            done.append(f"{kill.victim} at {kill.after_s:.1f}")

    return meanwhile


def _is(victim: str, words: list[str]) -> bool:
    """Whether a process with this command line is such a victim. torchrun's command line holds that of its ranks."""
    if victim == "a rank" and "torch.distributed.run" in words:
        return False
    return set(VICTIMS[victim]) <= set(words)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []
