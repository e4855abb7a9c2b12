"""The record of a run of the checks: a result for each, the machine and the code. This file imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.gpu_checks.outcome import Figure

Verdict = Literal["passed", "failed", "skipped", "error"]
JSON_NAME, PAGE_NAME = "gpu_checks.json", "gpu_checks.md"


@dataclass(frozen=True)
class CheckResult:
    """`seconds` are those of the whole process, `limit_s` its limit. `problems`: why the check failed or was skipped,
    or the last lines of a process that crashed or was ended."""

    check: str
    verdict: Verdict
    seconds: float
    limit_s: float
    figures: Mapping[str, Figure] = field(default_factory=dict)
    limits: Sequence[str] = field(default_factory=list)
    problems: Sequence[str] = field(default_factory=list)

    def as_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(**content)


@dataclass(frozen=True)
class Record:
    """Results of a run of the checks. `machine` has the GPU, driver, memory and versions, by name."""

    date: str  # UTC, ISO 8601
    commit: str
    device: str  # cuda or cpu
    machine: Mapping[str, str]
    results: Sequence[CheckResult]

    @property
    def passed(self) -> list[str]:
        return [result.check for result in self.results if result.verdict == "passed"]

    def with_verdict(self, *verdicts: Verdict) -> list[str]:
        """The names of the checks with one of the verdicts."""
        return [result.check for result in self.results if result.verdict in verdicts]


def write_record(folder: Path, record: Record, page: str) -> None:
    """Writes the record as JSON, and `page`, its Markdown form."""
    replace_file(folder / JSON_NAME, json.dumps(asdict(record), indent=1) + "\n")
    replace_file(folder / PAGE_NAME, page)


def read_record(folder: Path) -> Record | None:
    """The record in the folder; None without one. Raises UserError if the file is damaged."""
    path = folder / JSON_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = [CheckResult.from_json(one) for one in content.pop("results")]
        return Record(**content, results=results)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: this is no record of GPU checks ({error}); run minpro gpu-check again") from error
