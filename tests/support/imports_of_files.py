"""The modules and names that a file imports."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "minpro_megatron"


@cache
def imported_names(path: Path, lazily: bool = True) -> set[str]:
    """Every module, and every name out of a module, that the file imports: dotted and absolute. `lazily`: also inside
    functions and where types alone are checked."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names
