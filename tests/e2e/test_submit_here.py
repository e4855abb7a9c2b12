"""A run submitted to this machine alone, without Slurm: the same command, the same share of a node, and without an
activated environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, TinyModel
from tests.e2e.local_slurm import SMALL_RUN


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_run_here_tells_how_it_ended(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "data").symlink_to(ROOT / "recipes" / "data")
    profile = ["--profile", "cluster/profiles/this_machine.toml", "--set", f"workspace={tmp_path}"]
    model = [f"model.hf_path={tiny_model.hf}", f"model.megatron_path={tiny_model.megatron}", "name=here"]
    command = [sys.executable, "-m", "cluster.submit", "recipes.demo:tiny_moe_smoke", *profile, *model, *SMALL_RUN]
    environment = os.environ | {"NEMORUN_HOME": str(tmp_path / "nemo"), "PATH": "/usr/bin:/bin"}

    def submit(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip

    def status(name: str) -> subprocess.CompletedProcess[str]:
        asked = [sys.executable, "-m", "cluster.status", name]
        return subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    ended = submit()
    assert ended.returncode == 0, ended.stdout
    assert "finished 2 global steps" in ended.stdout
    assert (tmp_path / "runs" / "here" / "summary.json").exists()
    told = status("here")
    assert (told.returncode, told.stderr) == (0, "")
    assert f": COMPLETED; run in {tmp_path}/runs/here" in told.stdout
    failed = submit("name=there", "server.start_timeout_s=0.2")
    assert failed.returncode == 1
    assert "error: the role serve failed" in failed.stdout
    told = status("there")
    assert (told.returncode, ": FAILED (exit status 1)" in told.stdout) == (1, True)
