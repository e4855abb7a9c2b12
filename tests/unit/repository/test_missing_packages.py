"""A command that needs a package of an extra which is not installed says so in one line."""

import importlib.util
import re
import sys
import tomllib

import pytest

from minpro_megatron import __main__ as command_line
from minpro_megatron.errors import run_reporting
from minpro_megatron.missing_packages import EXTRAS, REQUIRED, missing_package
from tests.support.imports_of_files import PACKAGE, ROOT, imported_names

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What other packages require, and verl, with which the checks on a GPU compare where it is installed.
OTHERS = {"httpx", "latex2sympy2_extended", "markupsafe", "mpmath", "pydantic_core", "sympy", "verl", "yaml"}


def test_every_imported_package_is_required_or_has_an_extra() -> None:
    files = [path for name in (PACKAGE, "cluster", "recipes") for path in (ROOT / name).rglob("*.py")]
    modules = {name.partition(".")[0] for path in files for name in imported_names(path)}
    assert modules - sys.stdlib_module_names - OTHERS - {PACKAGE} <= EXTRAS.keys() | REQUIRED
    assert set(EXTRAS.values()) <= PROJECT["optional-dependencies"].keys()
    required = [re.split("[>=]", requirement)[0].replace("-", "_") for requirement in PROJECT["dependencies"]]
    assert sorted(required) == sorted(REQUIRED)


def _import_missing(*arguments: object) -> int:
    import tensorboard  # noqa: F401

    return 0


@pytest.mark.parametrize("caller", ["run_reporting", "run_command"])
def test_the_command_names_package_environment_and_extra(
    caller: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    if caller == "run_reporting":
        status = run_reporting(_import_missing)
    else:
        command = command_line.Command(__name__, "", _import_missing.__name__)
        monkeypatch.setitem(command_line.COMMANDS, "report", command)
        status = command_line.run_command("report", [], "minpro report")
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert line.startswith(f"error: the package tensorboard is not installed in {sys.prefix}; ")
    assert "pip install '.[train]' (without a GPU '.[cpu]')" in line


def test_a_python_without_the_packages_is_to_activate_the_environment() -> None:
    line = missing_package(ModuleNotFoundError("no", name="pydantic.fields"))
    assert line == (
        f"the package pydantic is not installed in {sys.prefix}; activate the environment that make setup has made, or "
        "install this project with pip"
    )


def test_an_older_python_is_named_before_any_file_with_newer_syntax(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("minpro_of_this_test", ROOT / PACKAGE / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    needed = "minpro-megatron needs Python 3.12 or later, and "
    with pytest.raises(ImportError, match=f"^{needed}.*; activate the environment"):
        spec.loader.exec_module(package)
    monkeypatch.setattr(sys, "argv", ["-m"])  # as it is while `python -m minpro_megatron` imports the package
    with pytest.raises(SystemExit):
        spec.loader.exec_module(package)
    assert capsys.readouterr().err.startswith(f"error: {needed}")


def test_a_module_of_the_project_that_is_missing_is_an_unexpected_error() -> None:
    assert missing_package(ModuleNotFoundError("no", name="minpro_megatron.nothing")) is None
