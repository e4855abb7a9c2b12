"""Where tests are: folders that mirror the package, and helpers beside the tests instead of inside them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.imports_of_files import PACKAGE, ROOT, imported_names

TESTS = ROOT / "tests"
TIERS = ("unit", "integration", "mesh", "e2e", "gpu")
# Folders of tests whose subject is beside the package.
BESIDE = {"benchmarks", "cluster", "mesh_support", "repository", "tools"}


def imports_of_test_files(tests: Path) -> Iterator[str]:
    """A line for every import of a test file, and for every import of a tier by what all tiers share."""
    for path in sorted(tests.rglob("*.py")):
        for name in sorted(imported_names(path)):
            parts = name.split(".")
            if parts[0] != tests.name:
                continue
            if any(part.startswith("test_") for part in parts[1:]):
                yield f"{path.relative_to(tests)} must not import {name}: move what both need to tests/support/"
            elif path.parent.name == "support" and parts[1:2] != ["support"]:
                yield f"{path.relative_to(tests)} must not import {name}: tests/support/ serves all tiers"


def test_no_test_file_imports_another() -> None:
    assert list(imports_of_test_files(TESTS)) == []


@pytest.mark.parametrize("tier", ["unit", "integration"])
def test_folders_of_tests_mirror_the_package(tier: str) -> None:
    package = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir()}
    folders = {path.parent.relative_to(TESTS / tier).as_posix() for path in (TESTS / tier).rglob("test_*.py")}
    assert folders - package - BESIDE == set()


def test_every_test_file_is_in_a_tier() -> None:
    assert {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")} == {*TIERS}


@pytest.mark.parametrize(
    ("file", "source", "breach"),
    [
        ("unit/test_b.py", "from tests.support.runs import make", None),
        ("unit/test_b.py", "from tests.unit.test_a import make", "must not import tests.unit.test_a"),
        ("e2e/rig.py", "def f():\n    import tests.unit.test_a", "must not import tests.unit.test_a"),
        ("unit/test_b.py", "from tests.unit import test_a", "must not import tests.unit.test_a"),
        ("support/runs.py", "from tests.mesh.harness import run_mesh", "serves all tiers"),
        ("support/runs.py", "from tests.support.files import write", None),
    ],
)
def test_the_check_itself_finds_imports(tmp_path: Path, file: str, source: str, breach: str | None) -> None:
    path = tmp_path / "tests" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = list(imports_of_test_files(tmp_path / "tests"))
    assert bool(found) == bool(breach)
    assert all(breach and breach in line for line in found)
