"""Every role killed in every phase, around every commit and file, and what is left: `make test-crashes`.

Not collected by `make test`, which tries a few of them (test_crashes.py). What is found goes into
crash_matrix_result.md case by case, so an interrupted run can be taken up again (`make test-crashes RESUME=1`).
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from minpro_megatron.monitor.environment import git_commit
from tests.e2e.conftest import ROOT, TinyModel
from tests.e2e.crash_cases import GOES_ON, Case, all_cases
from tests.e2e.crash_checks import check_bounded, model, undisturbed, undisturbed_episodes
from tests.e2e.crash_table import Row, Table
from tests.e2e.crashes import STEPS, CrashPoint, CrashRun, Launched, Results, differing

__all__ = ["model", "undisturbed", "undisturbed_episodes"]  # fixtures

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

CASES = all_cases()
TABLE = Table(
    path=Path(__file__).with_name("crash_matrix_result.md"),
    title="# Runs that were killed at every point, against one that was not",
    text=f"""\
Written by `make test-crashes` (tests/e2e/crash_matrix.py). Each case is a run of the whole system: serve, collect, two
Megatron ranks (tensor 2, expert 2), {STEPS} global steps of two updates, a checkpoint every second. It is crashed at
the point that its name says, by SIGKILL unless it says otherwise, and launched again with the same command until it
finishes. `ended with` are the statuses of the launches (-9: the launcher itself was killed), `went on from` the global
step whose checkpoint the last launch found. What is compared with an undisturbed run: the weights (SHA-256 of the
exported files), every consumed group's step, prompt, seeds, versions and staleness, every response's tokens, log-probs,
scores and reward, the evaluations, and the metrics that do not tell of the clock. `equal` means all of it, bit for bit;
`bounded` that every group was consumed once, with the prompt and the seeds of its id, and no token too old or too new;
`same order` (SGLang, whose tokens differ from run to run) that groups, steps, prompts and seeds are the same. After
every launch no process of it is left. Once the summary is written the run has finished: the last launch starts nothing,
and writes the report and the exported weights again after they were removed.""",
    columns=("case", "ended with", "went on from", "result", "seconds", "commit"),
)
DISK_BYTES = 640 << 20  # a launch wants to see half a GiB of room
LAUNCH_LIMIT_S = 500


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_run_goes_on(case: Case, model: TinyModel, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recorded = TABLE.read()
    if os.environ.get("CRASHES_RESUME") and case.name in recorded:
        pytest.skip("recorded")
    kind = "undisturbed_episodes" if case.has_episodes else "undisturbed"
    undisturbed: Results = request.getfixturevalue(kind)
    with _disk_of_its_own(case, tmp_path):
        row = _tried(case, CrashRun(model, tmp_path, "run", *case.overrides), undisturbed)
    TABLE.write(recorded | {case.name: row}, [one.name for one in CASES])


def _tried(case: Case, run: CrashRun, undisturbed: Results) -> Row:
    launches = []
    for point in case.points:
        launched = run.launch(point, LAUNCH_LIMIT_S)
        launches.append(launched)
        told = f"{launched.output}\n{run.logs()}"
        assert launched.reached, told
        assert launched.status == case.status, told
        if point.action != "kill":
            _make_room_again(run, point, told)
    if case.torn is not None:
        run.tear_journal(case.torn)
    if case.finished:
        launches.append(_launched_after_the_end(run))
    elif case.status != GOES_ON or not case.points:
        launches.append(run.launch(timeout_s=LAUNCH_LIMIT_S))
        assert launches[-1].status == 0, f"{launches[-1].output}\n{run.logs()}"
    assert run.num_launches == len(launches) - case.finished
    resumed = re.search(r"it resumes from its (?:checkpoint after global step (\d+)|beginning)", launches[-1].output)
    assert (resumed is None) == (len(launches) == 1 or case.finished or not case.sampled)
    return {
        "case": case.name,
        "ended with": ", ".join(str(launched.status) for launched in launches),
        "went on from": "" if resumed is None else f"step {resumed[1]}" if resumed[1] else "the beginning",
        "result": _compared(case, run, undisturbed),
        "seconds": f"{sum(launched.seconds for launched in launches):.0f}",
        "commit": git_commit(ROOT)[:7],
    }


def _launched_after_the_end(run: CrashRun) -> Launched:
    """A launch of a finished run, and another one after report and exported weights were lost."""
    launched = run.finish()
    assert f"all of its {STEPS} global steps were finished before" in launched.output
    export, kept = run.run_dir / "hf_export", run.run_dir.parent / "kept"
    (run.run_dir / "report.html").unlink()
    export.rename(kept)
    run.finish()
    assert (run.run_dir / "report.html").is_file()
    assert _tensors(export) == _tensors(kept)
    shutil.rmtree(export)
    kept.rename(export)  # the same weights, in files whose bytes are compared below
    return launched


def _tensors(export: Path) -> dict[str, bytes]:
    files = [load_file(path) for path in export.glob("*.safetensors")]
    return {name: array.tobytes() for file in files for name, array in file.items()}


def _compared(case: Case, run: CrashRun, undisturbed: Results) -> str:
    """What is equal; raises AssertionError where too little is."""
    if case.bounded:
        check_bounded(run.run_dir, undisturbed)
        return "bounded"
    results = Results.read(run.run_dir)
    if "server.engine=sglang" in case.overrides:
        assert results.groups == undisturbed.groups
        assert results.seeds == undisturbed.seeds
        assert results.states == undisturbed.states
        return "same order"
    assert [name for name in differing(results, undisturbed) if not (case.pruned and name == "rollouts")] == []
    if case.pruned:
        forgotten = [group_id for group_id, rows in results.rollouts.items() if rows[0][0] is None]
        assert forgotten, "nothing was pruned"
        kept = {group_id: rows for group_id, rows in undisturbed.rollouts.items() if group_id not in forgotten}
        assert {group_id: results.rollouts[group_id] for group_id in kept} == kept
        return "equal, but for what was pruned"
    return "equal"


def _make_room_again(run: CrashRun, point: CrashPoint, told: str) -> None:
    remedy = {
        "limit": "though the disk is not full; check for a quota",
        "fill": "free some space, then launch again",
    }
    assert remedy[point.action] in told, told
    if point.action == "fill":
        (run.run_dir / point.file).unlink()


@contextmanager
def _disk_of_its_own(case: Case, folder: Path) -> Iterator[None]:
    """A small file system at `folder` for a case that fills one."""
    if not any(point.action == "fill" for point in case.points):
        yield
        return
    options = f"size={DISK_BYTES}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
