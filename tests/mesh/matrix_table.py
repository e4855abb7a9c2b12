"""The record of what `make test-matrix` found: a Markdown table that is read back, so that runs add to it."""

import os
import platform
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path

TITLE = "# Every mesh of up to eight ranks against one process"
TEXT = """\
Written by `make test-matrix` (tests/mesh/matrix.py). One AdamW update of MinPRO on a mesh of gloo ranks is compared
with Hugging Face transformers, plain autograd and torch AdamW in float64 in one process. The numbers are relative
differences: of the loss, of the gradient's norm, of the entry of a gradient tensor that is furthest off (relative to
the tensor's largest entry; the tensor is named), and of the update (norm of the difference over norm of the update).
Allowed are {limits}. The seconds are those of a mesh's start and of both updates."""


@dataclass(frozen=True)
class Row:
    """One line of the table, as text."""

    model: str
    mesh: str
    ranks: str
    packing: str
    loss: str
    grad_norm: str
    gradient: str
    worst_tensor: str
    update: str
    seconds: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.mesh, self.packing


def read_rows(path: Path) -> dict[tuple[str, str, str], Row]:
    """The rows of the table at `path` by their key; none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [Row(*one) for one in cells[2:]]
    return {row.key: row for row in rows}


def write_rows(path: Path, rows: dict[tuple[str, str, str], Row], num_cases: int, limits: str) -> None:
    """Writes the complete file, rows in their natural order; a partly written file never replaces the last one."""
    names = [field.name.replace("_", " ") for field in fields(Row)]
    ordered = [astuple(rows[key]) for key in sorted(rows)]
    table = [names, ["---"] * len(names), *ordered]
    parts = [TITLE, TEXT.format(limits=limits), _summary(rows, num_cases), _machine()]
    text = "\n\n".join([*parts, "\n".join(f"| {' | '.join(cells)} |" for cells in table)])
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


def _summary(rows: dict[tuple[str, str, str], Row], num_cases: int) -> str:
    largest = {
        "loss": max(float(row.loss) for row in rows.values()),
        "gradient norm": max(float(row.grad_norm) for row in rows.values()),
        "gradient tensor": max(float(row.gradient) for row in rows.values()),
        "update": max(float(row.update) for row in rows.values()),
    }
    found = ", ".join(f"{what} {value:.1e}" for what, value in largest.items())
    return f"{len(rows)} of {num_cases} cases. Largest differences: {found}."


def _machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}."
