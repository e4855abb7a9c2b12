"""Runs submitted to a real Slurm of two nodes on this machine: to the end, killed, and started again."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from minpro_megatron.checkpoints.resume_point import read_latest
from tests.e2e.conftest import ROOT, TinyModel
from tests.e2e.local_slurm import SMALL_RUN, LocalSlurm, missing_programs

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing_programs()), reason="Slurm is not installed: apt-get install slurm-wlm munge"),
]
FIRST_PORT = 26817
PROFILE = ROOT / "cluster" / "profiles" / "local_slurm.toml"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    cluster = LocalSlurm(tmp_path_factory.mktemp("slurm"), FIRST_PORT)
    try:
        cluster.start()
        yield cluster
        for job in cluster.run("squeue", "--noheader", "--format=%i").split():
            cluster.run("scancel", "--signal=KILL", "--full", job)
    finally:
        cluster.stop()


class Workspace:
    """A folder that both nodes see, and the commands of cluster/ on it."""

    def __init__(self, folder: Path, slurm: LocalSlurm, model: TinyModel) -> None:
        self.folder, self._model = folder, model
        (folder / "recipes").mkdir()
        (folder / "recipes" / "data").symlink_to(ROOT / "recipes" / "data")
        self._environment = os.environ | slurm.environment | {"NEMORUN_HOME": str(folder / "nemo")}

    def command(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", f"cluster.{name}", *arguments],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        model = [f"model.hf_path={self._model.hf}", f"model.megatron_path={self._model.megatron}", f"name={name}"]
        profile = ["--profile", str(PROFILE), "--set", f"workspace={self.folder}", "--set", f"python={sys.executable}"]
        return self.command("submit", "recipes.demo:tiny_moe_smoke", *profile, *model, *SMALL_RUN, *arguments)

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those with this folder and all `words` in their command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if str(self.folder) in line and all(word in line for word in words):
                found.append(process)
        return found


@pytest.fixture
def workspace(tmp_path: Path, slurm: LocalSlurm, tiny_model: TinyModel) -> Workspace:
    return Workspace(tmp_path, slurm, tiny_model)


def ended(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"not ended within {timeout_s} s: {process.communicate()[0]}")
    return process.returncode, output


def until(holds: object, what: str, timeout_s: float = 250) -> None:
    deadline = time.monotonic() + timeout_s
    assert callable(holds)
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


@pytest.mark.timeout(600)
def test_a_run_over_two_nodes_ends_well(workspace: Workspace) -> None:
    status, output = ended(workspace.submit("whole"))
    assert status == 0, output
    assert "node 0: 1 trainer ranks\nnode 1: server 0, the collector\n" in output
    assert re.search(r"node 0 \(node1\) is ready\n.*node 1 \(node2\) is ready", output), output
    assert "finished 2 global steps" in output
    assert re.search(r"job \d+: COMPLETED on node\[1-2\]\njob \d+: completed", output), output
    logs = workspace.run_dir("whole") / "logs"
    assert {"train.log", "collect.log", "serve.log", "server-0.log"} <= {path.name for path in logs.iterdir()}
    # servers and collector are reached under an address that is not this machine's own business
    assert re.search(r"server 0 ready at http://(?!127\.)\d+\.\d+", (logs / "serve.log").read_text())
    assert not workspace.processes("minpro_megatron")
    status, output = ended(workspace.command("status", "whole"))
    assert status == 0
    assert re.match(r"whole  job \d+: COMPLETED on node\[1-2\]; run in ", output)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_role_fails_the_job_and_a_restart_goes_on(workspace: Workspace) -> None:
    """The trainer's ranks are on both nodes. The first start is killed once a checkpoint is there."""
    spread = ["--set", "topology.train_nodes=2", "--set", "topology.share_nodes=true", "parallel.tensor=2"]
    checkpoints = ["checkpoint.every_steps=1", "num_global_steps=8"]
    submitted = workspace.submit("killed", *spread, *checkpoints)
    run_dir = workspace.run_dir("killed")
    until(lambda: (run_dir / "checkpoints" / "latest").exists(), "a checkpoint")
    for process in workspace.processes("minpro_megatron", " collect "):
        process.send_signal(signal.SIGKILL)
    status, output = ended(submitted)
    assert status == 0, output
    assert "node 0: 1 trainer ranks\nnode 1: 1 trainer ranks, server 0, the collector\n" in output
    assert re.search(r"node 1 \(node2\): error: the role collect was ended by signal SIGKILL", output), output
    assert re.search(r"it resumes from its checkpoint after global step [1-8] \(start 2 of this run\)", output), output
    assert re.search(r"job \d+: COMPLETED on node\[1-2\] after 1 restart\n", output), output
    assert sorted(path.name for path in (run_dir / "starts").iterdir()) == ["0", "1"]
    latest = read_latest(run_dir)
    assert latest is not None
    assert latest.policy_version == 8


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_longer_than_its_time_limit_comes_to_its_end(workspace: Workspace) -> None:
    """Three seconds are over before the first global step: each start makes one and saves. That is no failure, and the
    job is started again although the profile has no restarts."""
    limit = ["num_global_steps=3", "checkpoint.every_steps=1000", "checkpoint.time_limit_minutes=0.05"]
    submitted = workspace.submit("limited", "--set", "restarts=0", *limit)
    status, output = ended(submitted, 800)
    assert status == 0, output
    ends = re.findall(r"ended after global step (\d), with a checkpoint: the time limit leaves -", output)
    assert ends == ["1", "2"], output
    for step in ends:
        assert f"it resumes from its checkpoint after global step {step} " in output
    assert re.search(r"job \d+: COMPLETED on node\[1-2\] after 2 restarts\n", output), output
    latest = read_latest(workspace.run_dir("limited"))
    assert latest is not None
    assert latest.policy_version == 3


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_starts_without_a_checkpoint_end_the_restarts(workspace: Workspace) -> None:
    submitted = workspace.submit(
        "stalled", "--set", "restarts=9", "num_global_steps=500", "checkpoint.every_steps=1000"
    )
    run_dir = workspace.run_dir("stalled")
    for number in range(2):
        until(lambda number=number: (run_dir / "starts" / str(number) / "verdict.json").exists(), f"start {number}")
        until(lambda: workspace.processes("minpro_megatron", " collect "), f"the roles of start {number}")
        for process in workspace.processes("minpro_megatron", " collect "):
            process.send_signal(signal.SIGKILL)
    status, output = ended(submitted)
    assert status == 1, output
    assert "error: starts 1 and 2 of the run have ended without a new checkpoint (there is none yet)" in output
    assert sorted(path.name for path in (run_dir / "starts").iterdir()) == ["0", "1", "2"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_damaged_checkpoint_ends_the_job_once_with_the_intact_one(workspace: Workspace) -> None:
    """Each rank would find it again at every start, so no restart is spent on it."""
    spread = ["--set", "topology.train_nodes=2", "--set", "topology.share_nodes=true", "parallel.tensor=2"]
    settings = [*spread, "--set", "restarts=3", "checkpoint.every_steps=1"]
    status, output = ended(workspace.submit("damaged", *settings))
    assert status == 0, output
    run_dir = workspace.run_dir("damaged")
    shard = run_dir / "checkpoints" / "step-000002" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    status, output = ended(workspace.submit("damaged", *settings, "num_global_steps=3"))
    assert status == 1, output
    assert f"{shard}: its SHA-256 is not the one in manifest.json; step-000001 is intact" in output
    assert "FAILED (exit status 2)" in output
    assert "restart" not in output.split("FAILED (exit status 2)")[1]
    assert sorted(path.name for path in (run_dir / "starts").iterdir()) == ["0", "1"]
    assert not workspace.processes("minpro_megatron")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_without_restarts_left_the_job_has_failed(workspace: Workspace) -> None:
    submitted = workspace.submit("failing", "--set", "restarts=0", "num_global_steps=200")
    run_dir = workspace.run_dir("failing")
    until(lambda: (run_dir / "status" / "train.json").exists(), "a trainer")
    ranks = workspace.processes("minpro_megatron", " train ")
    assert ranks
    # the profile's 20 minutes, by what Slurm says of the job
    (save_by,) = {float(line[line.index("--save-by") + 1]) for line in (rank.cmdline() for rank in ranks)}
    assert 300 < save_by - time.time() < 1200
    for process in ranks:
        process.send_signal(signal.SIGKILL)
    status, output = ended(submitted)
    assert status == 1, output
    assert "node 0 (node1): error: the role train " in output
    assert re.search(r"error: job \d+ of the run failing: FAILED \(exit status 1\) on node\[1-2\]; its log is", output)
    assert not workspace.processes("minpro_megatron")
    assert ended(workspace.command("status", "failing"))[0] == 1


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_job_that_is_cancelled_with_a_save_ends_with_a_checkpoint_and_resumes(workspace: Workspace) -> None:
    settings = ["num_global_steps=500", "checkpoint.every_steps=1000"]
    submitted = workspace.submit("saved", *settings)
    run_dir = workspace.run_dir("saved")
    until(lambda: (run_dir / "metrics.jsonl").exists(), "a first step")
    status, output = ended(workspace.command("cancel", "saved", "--save"))
    assert (status, "ends after the global step in progress and its checkpoint\n" in output) == (0, True), output
    status, output = ended(submitted)
    assert status == 1, output
    (version,) = re.findall(r"ended after global step (\d+), with a checkpoint: requested by minpro cancel --", output)
    assert [path.name for path in (run_dir / "starts").iterdir()] == ["0"]
    assert re.search(r"job \d+: ended with a checkpoint; submit the same command again to resume\n", output), output
    assert (run_dir / "starts" / "0" / "ended").exists()
    latest = read_latest(run_dir)
    assert latest is not None
    assert latest.policy_version == int(version)
    longer = [f"num_global_steps={int(version) + 1}", "checkpoint.every_steps=1000"]
    status, output = ended(workspace.submit("saved", *longer))
    assert status == 0, output
    assert f"it resumes from its checkpoint after global step {version} (start 2 of this run)" in output


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_cancelled_job_ends_and_problems_start_nothing(workspace: Workspace) -> None:
    assert ended(workspace.submit("cancelled", "--detach", "num_global_steps=500"))[0] == 0
    run_dir = workspace.run_dir("cancelled")
    until(lambda: (run_dir / "metrics.jsonl").exists(), "a first step")
    status, output = ended(workspace.submit("cancelled"))
    assert status == 2
    assert re.search(r"error: name = cancelled: job \d+ of this name has not ended; cancel it", output)
    followed = workspace.command("logs", "cancelled", "--follow")
    status, output = ended(workspace.command("cancel", "cancelled"))
    assert (status, output.endswith("cancellation requested\n")) == (0, True)
    status, output = ended(followed)
    assert status == 1
    assert re.search(r"error: job \d+ of the run cancelled: CANCELLED", output), output
    until(lambda: not workspace.processes("minpro_megatron"), "no process", 30)
    # what only the nodes can know: refused once, and not started again
    status, output = ended(workspace.submit("refused", "--set", "slurm.interface=none0"))
    assert status == 1
    assert re.search(
        r"error: node 1 \(node2\): --interface none0: this node has no such interface with an IPv4 address", output
    )
    assert "FAILED (exit status 2)" in output
    assert "restart" not in output
