"""What preflight says of a GPU machine's driver and C compiler."""

from pathlib import Path

import pytest

from minpro_megatron.launch.preflight.gpu_software import c_compiler, driver_cuda_version, software_problems


def test_an_older_driver_is_named_with_what_it_supports() -> None:
    assert list(software_problems(13_000, "gcc")) == list(software_problems(13_020, "gcc")) == []
    (problem,) = software_problems(12_080, "gcc")
    assert "supports CUDA 12.8, and the pinned packages need 13.0: install a driver of release 580" in problem


def test_a_missing_compiler_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert c_compiler() is None
    (problem,) = software_problems(13_000, c_compiler())
    assert problem.endswith("install gcc, or name a compiler in the environment variable CC")
    (tmp_path / "clang").touch(mode=0o755)
    assert c_compiler() == str(tmp_path / "clang")


def test_the_drivers_version_is_a_number_on_every_machine() -> None:
    assert driver_cuda_version() == 0 or driver_cuda_version() >= 1000
