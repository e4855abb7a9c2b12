"""docs/upgrading.md lists every private name of another library that the code uses, and the pinned versions."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.documents import ROOT

PAGE = ROOT / "docs" / "upgrading.md"
LIBRARIES = ("megatron", "torch", "sglang", "transformers", "nemo_run")
FOLDERS = ("minpro_megatron", "cluster", "benchmarks", "recipes", "environment")
# Documented although they begin with an underscore: methods of NamedTuple, and os._exit.
PUBLIC = {"_asdict", "_fields", "_make", "_replace", "_exit"}
PRIVATE = re.compile(r"_[A-Za-z]\w*")
A_PATH = re.compile(rf"(?:{'|'.join(LIBRARIES)})(?:\.\w+)*\.(_[A-Za-z]\w*)")  # in a string: a hook's target


@cache
def sources() -> dict[str, ast.Module]:
    """By path: files of the package relative to it, other files relative to the root, as the page names them."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "build" in path.parts or path.is_relative_to(ROOT / "minpro_megatron" / "cluster"):
                continue  # the latter is a link to cluster/
            name = str(path.relative_to(ROOT)).removeprefix("minpro_megatron/")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def own_names() -> frozenset[str]:
    """The private names that this project defines itself, and PUBLIC."""
    found = set(PUBLIC)
    for node in (node for tree in sources().values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
    return frozenset(found)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(tree: ast.AST) -> Iterator[str]:
    """The private names of other libraries that the code mentions; a module with a private part by its whole path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            parts = str(node.module).split(".")
            yield from [str(node.module)] if any(map(PRIVATE.fullmatch, parts)) else []
            yield from (alias.name for alias in node.names if PRIVATE.fullmatch(alias.name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] in LIBRARIES and any(map(PRIVATE.fullmatch, parts)):
                    yield alias.name
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and not _is_self(node.value):
            if node.attr not in own_names():
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (path := A_PATH.fullmatch(node.value)):
            yield path[1]


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its head."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_private_name_in_the_code_is_on_the_page() -> None:
    used = {(name, path) for path, tree in sources().items() for name in private_names(tree)}
    listed = {(name.strip("`"), path.strip("`")) for name, _, path, _, _ in table_rows("Private names")}
    by_string = {("_lazy_init", "parallel/device.py")}  # in a list of names to replace
    assert used == listed - by_string
    assert by_string <= listed


def test_the_versions_are_the_pinned_ones() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "environment" / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    checked = dict(table_rows("Versions checked"))
    assert checked == {name: pins[name] for name in checked}
    assert set(checked) == {name.replace("_", "-") for name in (*LIBRARIES[1:], "megatron-core")}
    named = {row[1] for heading in ("Private names", "Behaviour that is not documented") for row in table_rows(heading)}
    assert named == set(checked)


def test_uses_of_all_kinds_are_found() -> None:
    code = """
import torch._dynamo
from torch.distributed.utils import _private
from torch._C import Store
from numpy import _other
hook("sglang.srt.pool._register")
found = group._of_torch.public
self._mine = row._asdict()
"""
    assert list(private_names(ast.parse(code))) == ["torch._dynamo", "_private", "torch._C", "_register", "_of_torch"]


def test_every_file_on_the_page_exists() -> None:
    rows = [row[2] for heading in ("Private names", "Behaviour that is not documented") for row in table_rows(heading)]
    for path in re.findall(r"`([^`]+)`", " ".join(rows)):
        assert (ROOT / path).exists() or (ROOT / "minpro_megatron" / path).exists(), path


def test_the_page_names_tests_for_every_entry() -> None:
    for heading in ("Private names", "Behaviour that is not documented"):
        for row in table_rows(heading):
            assert "`tests/" in row[-1] or row[-1] in ("running the benchmark", "importing the file"), row
    assert all(Path(ROOT / path).exists() for path in re.findall(r"`(tests/[\w./]+)`", PAGE.read_text("utf-8")))
