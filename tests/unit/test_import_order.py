"""The package's import order: one direction, so that a folder can be read knowing only what stands before it."""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "minpro_megatron"

# Folders (and files) of the package. Each may import those of earlier lines, and itself.
ORDER = [
    ["terminal_text"],
    ["errors"],
    ["config", "records"],
    ["monitor"],
    ["objective"],
    ["batching"],
    ["serving"],
    ["rewards"],
    ["evaluation"],
    ["rollout"],
    ["parallel"],
    ["weights"],
    ["reference_engine"],
    ["actor"],
    ["planning"],
    ["train"],
    ["roles"],
    ["launch"],
    ["replay"],
    ["__main__"],
]
# Third-party modules that only some folders may import.
ONLY_IN = {
    "megatron.core.parallel_state": ["parallel"],
    "megatron": ["parallel", "weights", "actor"],
}
NO_TORCH = [
    "terminal_text",
    "errors",
    "config",
    "records",
    "serving",
    "rewards",
    "evaluation",
    "rollout",
    "planning",
    "launch",
    "__main__",
]
# What a recipe may import of the package: job images and submitting machines need nothing else.
RECIPES_IMPORT = f"{PACKAGE}.config"


@cache
def imported_names(path: Path) -> set[str]:
    """Every module, and every name out of a module, that the file imports anywhere: dotted and absolute."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def part_of(path: Path, package: Path) -> str:
    """The folder of the package that a file belongs to; for a file directly in it, the file's own name."""
    return path.relative_to(package).with_suffix("").parts[0]


def breaches(package: Path, order: list[list[str]]) -> Iterator[str]:
    """A line for every import against the order, and for everything that the order does not name."""
    place = {name: index for index, line in enumerate(order) for name in line}
    for path in sorted(package.rglob("*.py")):
        own = part_of(path, package)
        if own == "__init__":
            continue
        if own not in place:
            yield f"{own} has no place in the import order"
            continue
        for name in sorted(imported_names(path)):
            if not is_within(name, package.name) or name == package.name:
                continue
            other = name.split(".")[1]
            if other != own and place.get(other, len(order)) >= place[own]:
                yield f"{path.relative_to(package.parent)} must not import {name}"


def importers(parts: Iterable[str], module: str) -> list[str]:
    """The files of these parts of the package that import `module` or something in it."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        if part_of(path, ROOT / PACKAGE) in parts
        for name in sorted(imported_names(path))
        if is_within(name, module)
    ]


def test_imports_go_one_way():
    assert list(breaches(ROOT / PACKAGE, ORDER)) == []


@pytest.mark.parametrize("module", ONLY_IN)
def test_megatron_is_read_only_where_it_is_known(module):
    others = {name for line in ORDER for name in line} - set(ONLY_IN[module])
    assert importers(others, module) == []


def test_what_needs_no_torch_imports_none():
    assert importers(NO_TORCH, "torch") == []


def test_recipes_import_only_settings():
    for path in sorted((ROOT / "recipes").rglob("*.py")):
        ours = [name for name in imported_names(path) if is_within(name, PACKAGE)]
        assert [name for name in ours if not is_within(name, RECIPES_IMPORT)] == [], path


def test_package_files_hold_nothing():
    assert [path for path in (ROOT / PACKAGE).rglob("__init__.py") if path.read_text().strip()] == []


@pytest.mark.parametrize(
    ("source", "breach"),
    [
        ("from here.low import x", None),
        ("import here.high.thing", None),
        ("from here.top import x", "must not import here.top"),
        ("import os, here.top", "must not import here.top"),
        ("def f():\n    from here import top", "must not import here.top"),
        ("from here.elsewhere import x", "must not import here.elsewhere"),
    ],
)
def test_the_check_itself_finds_breaches(tmp_path, source, breach):
    package = tmp_path / "here"
    (package / "high").mkdir(parents=True)
    (package / "high" / "file.py").write_text(source)
    found = list(breaches(package, [["low"], ["high"], ["top"]]))
    assert bool(found) == bool(breach)
    assert all(breach and breach in line for line in found)
    (package / "new.py").touch()
    assert "new has no place in the import order" in list(breaches(package, [["low"], ["high"], ["top"]]))
