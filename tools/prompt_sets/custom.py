"""Any JSON Lines or parquet file, by the names of its columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.prompt_sets import rows
from tools.prompt_sets.answers import answer_text
from tools.prompt_sets.assemble import Question
from tools.prompt_sets.mathematics import only_message, unwrap


@dataclass(frozen=True)
class CustomSet:
    """Columns by name; a dot goes into an object: `reward_model.ground_truth`. Empty: there is no such column."""

    prompt: str
    answer: str
    pass_rate: str = ""
    prefix: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        names = (self.prompt, self.answer, self.pass_rate, self.prefix)
        # a parquet column may have a dot in its own name
        return tuple({part for name in names if name for part in (name, name.partition(".")[0])})

    def convert(self, path: Path, number: int, row: dict[str, Any]) -> Question:
        prompt = _value(path, number, row, self.prompt)
        if isinstance(prompt, list):
            text = only_message(path, number, prompt)
        else:
            text = rows.text_field(path, number, {self.prompt: prompt}, self.prompt)
        try:
            answer = answer_text(_value(path, number, row, self.answer))
        except ValueError as error:
            raise rows.DamagedRow(path, number, self.answer, str(error)) from None
        return Question(unwrap(text), answer, self._prefix(path, number, row), self._pass_rate(path, number, row))

    def _prefix(self, path: Path, number: int, row: dict[str, Any]) -> str:
        prefix = _value(path, number, row, self.prefix) if self.prefix else ""
        if prefix is not None and not isinstance(prefix, str):
            raise rows.DamagedRow(path, number, self.prefix, f"must be a text, is {type(prefix).__name__}")
        return prefix or ""

    def _pass_rate(self, path: Path, number: int, row: dict[str, Any]) -> float | None:
        rate = _value(path, number, row, self.pass_rate) if self.pass_rate else None
        if rate is None:
            return None
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise rows.DamagedRow(path, number, self.pass_rate, f"must be a number from 0 to 1, is {rate!r:.60}")
        return float(rate)


def _value(path: Path, number: int, row: Mapping[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise rows.DamagedRow(path, number, column, f"is missing; the row has {sorted(row)}")
        value = value[name]
    return value
