"""The record of runs that were killed: a Markdown table that is read back, so that runs add to it."""

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

Row = Mapping[str, str]  # by column


@dataclass(frozen=True)
class Table:
    """A title, a text and a table. The first column names the row; one column is `result`."""

    path: Path
    title: str
    text: str
    columns: tuple[str, ...]

    def read(self) -> dict[str, Row]:
        """The rows by their names; none if there is no file."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        return {one[0]: dict(zip(self.columns, one, strict=True)) for one in cells[2:]}

    def write(self, rows: Mapping[str, Row], names: Sequence[str]) -> None:
        """Replaces the whole file, with the rows in the order of `names`. A reader never sees half of it."""
        ordered = [rows[name] for name in names if name in rows]
        counts = ", ".join(f"{count} {result}" for result, count in Counter(row["result"] for row in ordered).items())
        table = [self.columns, ["---"] * len(self.columns), *([row[name] for name in self.columns] for row in ordered)]
        parts = [self.title, self.text, f"{len(ordered)} of {len(names)} cases: {counts}.", _machine()]
        text = "\n\n".join([*parts, "\n".join(f"| {' | '.join(cells)} |" for cells in table)])
        partial = self.path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self.path)


def _machine() -> str:
    packages = ("torch", "megatron-core", "sglang", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}."
