"""The job image installs what pyproject.toml and the constraints say, and nothing under a version of its own."""

import re
import tomllib
from pathlib import Path

from minpro_megatron import __version__

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, str]:
    files = ("constraints.txt", "constraints_gpu.txt")
    lines = [line for name in files for line in (ROOT / "environment" / name).read_text().splitlines()]
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_requirements_come_from_the_project(tmp_path: Path, monkeypatch, capsys) -> None:
    (program,) = re.findall(r"RUN python -c '(import tomllib.*)'", DOCKERFILE)
    monkeypatch.chdir(ROOT)
    exec(compile(program, "Dockerfile", "exec"), {})
    wanted = PROJECT["dependencies"] + EXTRAS["train"] + EXTRAS["serve"]
    assert capsys.readouterr().out.splitlines() == wanted
    assert "-c environment/constraints.txt -c environment/constraints_gpu.txt" in DOCKERFILE


def test_every_exact_version_is_pinned_alike() -> None:
    exact = re.findall(
        r"^([\w-]+)(?:\[[\w,]+\])?==([\w.]+)$", "\n".join(EXTRAS["train"] + EXTRAS["serve"]), re.MULTILINE
    )
    assert {name for name, _ in exact} >= {"torch", "megatron-core", "transformer-engine", "sglang"}
    assert [(name, version) for name, version in exact if pins()[name] != version] == []


def test_no_other_version_is_in_it() -> None:
    assert re.findall(r"==|pip install [^\n]*\d+\.\d+", DOCKERFILE) == []
    assert f"minpro-megatron:{__version__}" in DOCKERFILE
    image = (ROOT / "cluster" / "profiles" / "h100_slurm.toml").read_text()
    assert f"minpro-megatron:{__version__}" in image


def test_the_base_image_has_the_cuda_that_torch_is_built_for() -> None:
    (version,) = re.findall(r"ARG CUDA_VERSION=(\d+\.\d+)\.\d+", DOCKERFILE)
    assert pins()["cuda-toolkit"].startswith(f"{version}.")
    assert any(f"core_cu{version.split('.')[0]}" in requirement for requirement in EXTRAS["train"])


def test_apex_comes_from_nvidias_repository_only() -> None:
    assert re.findall(r"apex @ \S+", DOCKERFILE) == ['apex @ git+https://github.com/NVIDIA/apex@${APEX_COMMIT}";']
    assert 'ARG APEX_COMMIT=""' in DOCKERFILE
