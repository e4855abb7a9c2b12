"""No file calls a collective that torch has deprecated: every such call warns, on every rank."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest
import torch.distributed as dist

from tests.support.imports_of_files import PACKAGE, ROOT

DEPRECATED = {
    name for name, value in vars(dist).items() if type(value) is FunctionType and hasattr(value, "__deprecated__")
}


def deprecated_calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in DEPRECATED:
            yield f"{path.name}:{node.lineno} uses {node.attr}"


def test_torch_marks_what_it_has_deprecated() -> None:
    assert "all_gather_into_tensor" in DEPRECATED


@pytest.mark.parametrize("folder", [PACKAGE, "benchmarks", "tests"])
def test_no_deprecated_collective_is_called(folder: str) -> None:
    found = [line for path in sorted((ROOT / folder).rglob("*.py")) for line in deprecated_calls(path)]
    assert found == []
