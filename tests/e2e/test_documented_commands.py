"""The commands of README and documentation that this machine can run within seconds work as they are printed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, TinyModel
from tests.support.documents import shell_commands

# The pages in the order in which a reader meets their commands; later ones use what earlier ones have made.
PAGES = ["README.md"] + [
    f"docs/{name}.md"
    for name in ("models", "data_and_rewards", "extending", "inspecting_runs", "quickstart", "cluster")
]
# What does not run here, or not within seconds: whole tiers and runs, data sets of the hub, a cluster's login node.
NOT_RUN_HERE = (
    "make ",
    "minpro prepare dapo",
    "minpro submit recipes.qwen3",
    "minpro logs first --follow",
    "minpro cancel first",
)


def clone(folder: Path, model: TinyModel) -> Path:
    """A copy of the checkout after `make demo`, without the run's length: the tiny model is there, in both formats."""
    left_out = shutil.ignore_patterns(".*", "artifacts", "runs", "__pycache__", "results", "tests")
    shutil.copytree(ROOT, folder, ignore=left_out)
    shutil.copytree(model.hf, folder / "artifacts" / "tiny_moe" / "hf")
    shutil.copytree(model.megatron, folder / "artifacts" / "tiny_moe" / "megatron")
    programs = folder / "programs"
    programs.mkdir()
    for name, module in (("minpro", "-m minpro_megatron"), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        program.chmod(0o755)
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_commands_work_as_printed(tiny_model: TinyModel, tmp_path: Path) -> None:
    checkout = clone(tmp_path / "clone", tiny_model)
    environment = os.environ | {
        "PATH": f"{checkout / 'programs'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "NEMORUN_HOME": str(tmp_path / "nemo"),
    }

    def run(command: str) -> None:
        done = subprocess.run(
            ["bash", "-c", command], cwd=checkout, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        print(f"ran: {command}")

    run("minpro launch recipes.demo:tiny_moe_smoke name=demo num_global_steps=6")  # pages look at its step 3
    shutil.copytree(checkout / "runs" / "demo", checkout / "runs" / "demo-cispo")
    done = set()
    for page in PAGES:
        for command in shell_commands(ROOT / page):
            if command not in done and not command.startswith(NOT_RUN_HERE):
                run(command)
                done.add(command)
    assert len(done) > 20
    assert (checkout / "runs" / "my-model" / "summary.json").exists()
