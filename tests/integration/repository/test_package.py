"""An installed package has one command that works from any folder, and takes no name but its own."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.long, pytest.mark.timeout(170)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the project's wheel and, behind it, the packages of this environment."""
    folder = tmp_path_factory.mktemp("package")
    source, wheels, venv = folder / "source", folder / "wheels", folder / "venv"
    source.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    # from a copy, because building leaves files beside the sources
    packed = subprocess.run(["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input=files, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", source], input=packed.stdout, check=True)
    _run(sys.executable, "-m", "venv", "--without-pip", venv)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, source)
    (wheel,) = wheels.iterdir()
    _run(*pip, "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = venv.glob("lib/python3*/site-packages")
    # The .pth files of a folder that is named in a .pth file are ignored: the editable install here is not seen there.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def _run(*command: object, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_command_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    def minpro(*arguments: str) -> str:
        return _run(installed / "bin" / "minpro", *arguments, cwd=tmp_path)

    assert "recipes.qwen3_30b_a3b:minpro " in minpro("recipes")
    settings = minpro("settings", "recipes.demo:tiny_moe", "model.hf_path", "data.train_file")
    assert f"model.hf_path = {tmp_path}/artifacts/tiny_moe/hf" in settings
    assert Path(settings.partition("data.train_file = ")[2].partition("\n")[0]).is_file()
    assert "30.53 billion parameters" in minpro("plan", "recipes.qwen3_30b_a3b:minpro")
    assert "--profile FILE" in minpro("submit", "--help")
    (tmp_path / "mine.py").write_text(
        "from minpro_megatron.recipes.demo import tiny_moe_smoke\n\n\ndef mine():\n    return tiny_moe_smoke()\n"
    )
    assert "name = demo-smoke" in minpro("settings", "./mine.py:mine", "name")
    assert list(tmp_path.glob("[!_]*")) == [tmp_path / "mine.py"]


def test_no_other_name_is_taken(installed: Path) -> None:
    (packages,) = installed.glob("lib/python3*/site-packages")
    names = {path.name for path in packages.iterdir() if path.is_dir() and path.suffix != ".dist-info"}
    assert names == {"minpro_megatron"}
    inside = {path.relative_to(packages).as_posix() for path in packages.rglob("*")}
    assert {
        "minpro_megatron/cluster/profiles/h100_slurm.toml",
        "minpro_megatron/cluster/Dockerfile",
        "minpro_megatron/recipes/data/calculator_train.jsonl",
        "minpro_megatron/report/report.html.jinja",
        "minpro_megatron/models/known_models/qwen3-8b.json",
    } <= inside
