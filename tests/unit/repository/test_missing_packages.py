"""A command that needs a package of an extra which is not installed says so in one line."""

import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from minpro_megatron import __main__ as command_line
from minpro_megatron.errors import run_reporting
from minpro_megatron.missing_packages import EXTRAS, missing_package
from tests.support.imports_of_files import PACKAGE, ROOT, imported_names

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# transformers requires it; verl and the first are compared with where they are installed
OTHERS = {"yaml", "verl", "mpmath", "sympy", "latex2sympy2_extended", "markupsafe", "pydantic_core", "httpx"}


def test_every_imported_package_is_required_or_has_an_extra() -> None:
    files = [path for name in (PACKAGE, "cluster", "recipes") for path in (ROOT / name).rglob("*.py")]
    modules = {name.partition(".")[0] for path in files for name in imported_names(path)}
    distributions = packages_distributions()
    required = " ".join(PROJECT["dependencies"]).replace("_", "-").lower()
    unknown = {
        name
        for name in modules - sys.stdlib_module_names - EXTRAS.keys() - OTHERS - {PACKAGE}
        if not any(found.replace("_", "-").lower() in required for found in distributions.get(name, [name]))
    }
    assert unknown == set()
    assert set(EXTRAS.values()) <= PROJECT["optional-dependencies"].keys()


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


def test_a_module_of_the_project_that_is_missing_is_an_unexpected_error() -> None:
    assert missing_package(ModuleNotFoundError("no", name="minpro_megatron.nothing")) is None
