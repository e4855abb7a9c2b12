"""What the README and the documents state can be looked up: the metrics, the paths, the commands."""

import re
from pathlib import Path

import pytest

from minpro_megatron.metrics.declared import metric_table

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "minpro_megatron"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_metric_table_is_the_registry() -> None:
    assert metric_table() in README


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= targets


def named_paths() -> list[tuple[str, str]]:
    """(page, path) of every file or folder that a page names between backquotes: from the root, or in the package."""
    tops = "|".join(path.name for base in (ROOT, ROOT / PACKAGE) for path in base.iterdir() if path.is_dir())
    pattern = re.compile(rf"`((?:{tops})/(?:[\w./*-]*\.\w+|[\w/]*/)?)`")
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = {(page.name, path) for page in pages for path in pattern.findall(page.read_text(encoding="utf-8"))}
    return sorted(found)


@pytest.mark.parametrize(("page", "path"), named_paths())
def test_every_path_it_names_exists(page: str, path: str) -> None:
    assert any(ROOT.glob(path)) or any((ROOT / PACKAGE).glob(path))


def test_the_tests_that_the_table_of_damage_names_exist() -> None:
    text = (ROOT / "docs" / "damage_and_attacks.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    assert len(named) > 20
    assert named <= {path.name for path in (ROOT / "tests").rglob("*.py")}
