"""The pinned versions, the set-up script and the CPU stand-ins: what has to hold before all else."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from environment.owner import owner

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = ROOT / "environment"
SETUP = ENVIRONMENT / "setup.sh"
SGLANG_CPU = ENVIRONMENT / "sglang_cpu"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# A Python outside any virtual environment, as set-up looks for one.
BASE_PYTHON = os.path.realpath(sys.executable)


def read_pins(name: str) -> dict[str, str]:
    lines = (ENVIRONMENT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


SHARED_PINS = read_pins("constraints.txt")
GPU_PINS = SHARED_PINS | read_pins("constraints_gpu.txt")


# --- versions ---


@pytest.mark.parametrize("name", ["constraints.txt", "constraints_gpu.txt"])
def test_constraints_are_names_and_versions_only(name: str):
    lines = (ENVIRONMENT / name).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "make constraints" in lines[1]
    pins = [line for line in lines if not line.startswith("#")]
    # No address, path, marker, hash or local version label can get through this.
    malformed = [line for line in pins if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line)]
    assert malformed == []
    assert pins == sorted(set(pins), key=lambda line: line.split("==")[0])
    assert not any(line.startswith("minpro-") for line in pins)


def test_gpu_constraints_only_add():
    assert not SHARED_PINS.keys() & read_pins("constraints_gpu.txt").keys()


@pytest.mark.parametrize(
    ("extra", "pins"),
    [
        ("core", SHARED_PINS),
        ("cpu", SHARED_PINS),
        ("cluster", SHARED_PINS),
        ("dev", SHARED_PINS),
        ("train", GPU_PINS),
        ("serve", GPU_PINS),
    ],
)
def test_every_dependency_is_pinned_to_a_version_it_allows(extra: str, pins: dict[str, str]):
    for text in PROJECT["dependencies"] if extra == "core" else EXTRAS[extra]:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{text}: run make constraints"
        assert requirement.specifier.contains(version, prereleases=True), f"{text}: pinned to {version}"


@pytest.mark.parametrize("distribution", ["sglang", "megatron-core", "nemo_run", "leptonai"])
def test_pins_satisfy_the_packages_that_matter(distribution: str):
    # sglang is installed without its dependencies, so pip never compares its pins with ours.
    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        version = GPU_PINS.get(canonicalize_name(requirement.name))
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and version is not None:
            assert requirement.specifier.contains(version, prereleases=True), f"{text}: pinned to {version}"


def test_unrelated_package_apex_is_no_dependency():
    everything = PROJECT["dependencies"] + [text for extra in EXTRAS.values() for text in extra]
    assert "apex" not in {canonicalize_name(Requirement(text).name) for text in everything}
    assert "apex" not in GPU_PINS


# --- set-up ---


def write_script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run_setup(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run set-up where every Python on PATH is a shim that fails, as those of an unselected pyenv version."""
    for name in ("python3.12", "python3.13", "python3", "uv"):
        write_script(tmp_path / "bin" / name, f"echo '{name}: command not found' >&2; exit 127")
    write_script(tmp_path / "home/.pyenv/versions/3.12.9/bin/python", "exit 1")
    env = {
        "PATH": str(tmp_path / "bin"),
        "HOME": str(tmp_path / "home"),
        "MINPRO_VENV": str(tmp_path / "venv"),
    }
    return subprocess.run(
        ["/bin/bash", str(SETUP), *arguments], env=env | variables, capture_output=True, text=True, timeout=60
    )


def test_setup_without_a_working_python_prints_one_line_and_leaves_nothing(tmp_path: Path):
    result = run_setup(tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "MINPRO_PYTHON" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "home"}


def test_setup_passes_over_broken_shims(tmp_path: Path):
    python = tmp_path / "home/.pyenv/versions/3.13.7/bin/python"
    write_script(python, f'exec "{BASE_PYTHON}" "$@"')
    result = run_setup(tmp_path, "--python")
    assert (result.returncode, result.stdout.strip()) == (0, str(python)), result.stderr


def test_setup_does_not_replace_the_python_that_was_asked_for(tmp_path: Path):
    write_script(tmp_path / "home/.pyenv/versions/3.13.7/bin/python", f'exec "{BASE_PYTHON}" "$@"')
    result = run_setup(tmp_path, "--python", MINPRO_PYTHON="/no/such/python")
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "/no/such/python" in result.stderr


def test_setup_refuses_to_empty_a_folder_that_is_no_virtual_environment(tmp_path: Path):
    precious = tmp_path / "venv/thesis.tex"
    precious.parent.mkdir()
    precious.write_text("x")
    path = os.pathsep.join([str(tmp_path / "bin"), os.defpath])
    result = run_setup(tmp_path, MINPRO_PYTHON=BASE_PYTHON, PATH=path)
    assert result.returncode == 1
    assert "not a virtual environment" in result.stderr
    assert precious.read_text() == "x"


def test_an_environment_stays_that_of_the_checkout_that_made_it(tmp_path: Path):
    """Set-up in another checkout asks this file, and installs the project only where it names none."""
    checkout, packages = tmp_path / "a checkout", tmp_path / "packages"
    information = packages / "minpro_megatron-0.1.0.dist-info"
    information.mkdir(parents=True)
    checkout.mkdir()
    (information / "METADATA").write_text("Name: minpro-megatron\nVersion: 0.1.0\n")
    assert owner(str(packages)) is None
    stated = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
    (information / "direct_url.json").write_text(json.dumps(stated))
    assert owner(str(packages)) is None  # the checkout was removed
    (checkout / "pyproject.toml").touch()
    assert owner(str(packages)) == checkout
    (information / "direct_url.json").write_text(json.dumps(stated | {"dir_info": {}}))
    assert owner(str(packages)) is None  # an installed wheel is that of no checkout


def test_shell_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run(
        [shellcheck, SETUP, ROOT / ".ci/run"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("target", ["demo", "test", "test-unit", "test-integration", "test-mesh", "test-e2e", "lint"])
def test_make_targets_set_up_first_and_use_its_python(target: str):
    result = subprocess.run(
        ["make", "--dry-run", target, "MINPRO_VENV=/elsewhere", "ARGS=--flag"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first, *rest = result.stdout.splitlines()
    assert first == "environment/setup.sh"
    assert rest
    # and writes nowhere else: the files of Transformer Engine are fetched into the environment where they are missing
    assert all(line.startswith(("/elsewhere/bin/", "rm -rf /elsewhere/", "mv /elsewhere/")) for line in rest), rest
    assert target == "lint" or rest[-1].endswith("--flag")


# --- without a GPU ---


@pytest.fixture
def sglang_cpu_sources(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make the sources importable, whatever is installed; return the module that looks for a driver."""
    for name in (
        "sgl_kernel",
        "minpro_sglang_cpu",
        "minpro_sglang_cpu.cuda_driver",
        "minpro_sglang_cpu.plugin",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(SGLANG_CPU / "src"))
    return importlib.import_module("minpro_sglang_cpu.cuda_driver")


def test_stand_in_resolves_names_and_raises_when_one_is_called(
    sglang_cpu_sources: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sglang_cpu_sources, "find_cuda_driver", lambda: None)
    sgl_kernel = importlib.import_module("sgl_kernel")
    assert Path(str(sgl_kernel.__file__)).is_relative_to(SGLANG_CPU)
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.fp8_scaled_mm .*--device cpu"):
        sgl_kernel.fp8_scaled_mm(1, out=None)
    with pytest.raises(AttributeError):
        _ = sgl_kernel.__wrapped__


def test_stand_in_refuses_where_a_driver_is(sglang_cpu_sources: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sglang_cpu_sources, "find_cuda_driver", lambda: "libcuda.so.1")
    with pytest.raises(RuntimeError, match=r"libcuda\.so\.1.*environment/setup\.sh"):
        importlib.import_module("sgl_kernel")


@pytest.fixture
def environment_with_driver(tmp_path: Path) -> dict[str, str]:
    """The environment variables of a machine on which the dynamic loader finds a libcuda.so.1."""
    # Any library will do: only whether it loads is looked at.
    (tmp_path / "libcuda.so.1").symlink_to(str(importlib.import_module("_ctypes").__file__))
    return os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(SGLANG_CPU / "src")}


def test_driver_is_found_by_the_loader(environment_with_driver: dict[str, str]):
    script = SGLANG_CPU / "src/minpro_sglang_cpu/cuda_driver.py"
    result = subprocess.run(
        [sys.executable, script], env=environment_with_driver, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, "libcuda.so.1\n")


@pytest.mark.parametrize("command", [["-c", "import sgl_kernel"], ["setup.py", "--version"]])
def test_neither_import_nor_installation_where_a_driver_is(environment_with_driver: dict[str, str], command: list[str]):
    result = subprocess.run(
        [sys.executable, *command],
        cwd=SGLANG_CPU,
        env=environment_with_driver,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert "only for machines without an NVIDIA driver" in result.stderr.splitlines()[-1]


def installed_sglang_source(path: str) -> str:
    spec = importlib.util.find_spec("sglang")  # does not import it, which takes seconds
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / path).read_text()


def test_plugin_hooks_what_the_installed_sglang_has(sglang_cpu_sources: ModuleType, monkeypatch: pytest.MonkeyPatch):
    hooks = {}

    class HookRegistry:
        @staticmethod
        def register(target, hook, hook_type):
            hooks[target] = (hook, hook_type)

    class HookType:
        REPLACE, AROUND = "replace", "around"

    fake = ModuleType("sglang.srt.plugins.hook_registry")
    vars(fake).update(HookRegistry=HookRegistry, HookType=HookType)
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    plugin = importlib.import_module("minpro_sglang_cpu.plugin")

    monkeypatch.setattr(plugin, "find_cuda_driver", lambda: "libcuda.so.1")
    plugin.register_hooks()
    assert hooks == {}

    monkeypatch.setattr(plugin, "find_cuda_driver", lambda: None)
    plugin.register_hooks()
    register = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"
    assert hooks.keys() == {register, "torch.get_device_module"}
    replacement, kind = hooks[register]
    assert (kind, replacement(object(), registration_granularity_bytes=1)) == ("replace", None)
    around, kind = hooks["torch.get_device_module"]
    assert (kind, around(str), around(str, "meta")) == ("around", "cpu", "meta")


def test_plugin_is_declared_where_the_installed_sglang_looks():
    declared = tomllib.loads((SGLANG_CPU / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared == {"sglang.srt.plugins": {"minpro_cpu": "minpro_sglang_cpu.plugin:register_hooks"}}
    plugins, host_pool, weights = (
        installed_sglang_source(path)
        for path in (
            "srt/plugins/__init__.py",
            "srt/mem_cache/pool_host/common.py",
            "srt/managers/scheduler_components/weight_updater.py",
        )
    )
    assert 'GENERAL_PLUGINS_GROUP = "sglang.srt.plugins"' in plugins
    assert "\ndef _cuda_host_register(" in host_pool
    assert "torch.get_device_module().synchronize()" in weights
