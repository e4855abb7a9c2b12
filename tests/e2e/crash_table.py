"""The record of what `make test-crashes` found: a Markdown table that is read back, so that runs add to it."""

import os
import platform
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path

TITLE = "# Runs that were killed at every point, against one that was not"
TEXT = """\
Written by `make test-crashes` (tests/e2e/crash_matrix.py). Each case is a run of the whole system: serve, collect, two
Megatron ranks (tensor 2, expert 2), {steps} global steps of two updates, a checkpoint every second. It is crashed at
the point that its name says, by SIGKILL unless it says otherwise, and launched again with the same command until it
finishes. `ended with` are the statuses of the launches (-9: the launcher itself was killed), `went on from` the global
step whose checkpoint the last launch found. What is compared with an undisturbed run: the weights (SHA-256 of the
exported files), every consumed group's step, prompt, seeds, versions and staleness, every response's tokens, log-probs,
scores and reward, the evaluations, and the metrics that do not tell of the clock. `equal` means all of it, bit for bit;
`bounded` that every group was consumed once, with the prompt and the seeds of its id, and no token too old or too new;
`same order` (SGLang, whose tokens differ from run to run) that groups, steps, prompts and seeds are the same. After
every launch no process of it is left. Once the summary is written the run has finished: the last launch starts nothing,
and writes the report and the exported weights again after they were removed."""


@dataclass(frozen=True)
class Row:
    """One line of the table, as text."""

    case: str
    ended_with: str
    went_on_from: str
    result: str
    seconds: str
    commit: str = ""


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of the table at `path` by their case; none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [Row(*one) for one in cells[2:]]
    return {row.case: row for row in rows}


def write_rows(path: Path, rows: dict[str, Row], cases: list[str], num_steps: int) -> None:
    """The whole file anew, rows in the order of `cases`; a half-written file never takes the place of the last one."""
    ordered = [rows[case] for case in cases if case in rows]
    results: dict[str, int] = {}
    for row in ordered:
        results[row.result] = results.get(row.result, 0) + 1
    counts = ", ".join(f"{count} {result}" for result, count in results.items())
    names = [field.name.replace("_", " ") for field in fields(Row)]
    table = [names, ["---"] * len(names), *(astuple(row) for row in ordered)]
    parts = [TITLE, TEXT.format(steps=num_steps), f"{len(ordered)} of {len(cases)} cases: {counts}.", _machine()]
    text = "\n\n".join([*parts, "\n".join(f"| {' | '.join(cells)} |" for cells in table)])
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


def _machine() -> str:
    packages = ("torch", "megatron-core", "sglang", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}."
