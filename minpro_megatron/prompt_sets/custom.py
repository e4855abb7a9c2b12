"""Any data file, by the names of its columns."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from minpro_megatron.prompt_sets import data_files, rows
from minpro_megatron.prompt_sets.answers import ListRule, answer_text
from minpro_megatron.prompt_sets.assemble import Question
from minpro_megatron.prompt_sets.chats import chat_in, system_and_question
from minpro_megatron.prompt_sets.instructions import without_instructions

_DECIMAL = re.compile(r"\d{0,3}\.?\d{1,20}(?:[eE]-?\d{1,3})?")


@dataclass(frozen=True)
class CustomSet:
    """Columns by name; a dot refers into an object: `reward_model.ground_truth`. Empty: there is no such column. The
    other columns of a row are kept with `keeps_metadata`."""

    prompt: str
    answer: str
    pass_rate: str = ""
    prefix: str = ""
    answer_lists: ListRule = "one"
    keeps_metadata: bool = True

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns to read; None: all."""
        if self.keeps_metadata:
            return None
        names = (self.prompt, self.answer, self.pass_rate, self.prefix)
        # a parquet column may have a dot in its own name
        return tuple({part for name in names if name for part in (name, name.partition(".")[0])})

    def convert(self, path: Path, number: int, row: dict[str, Any]) -> Question:
        prompt = _value(path, number, row, self.prompt)
        messages = chat_in(prompt)
        system = ""
        if messages is not None:
            system, text = system_and_question(path, number, messages)
        else:
            text = rows.text_field(path, number, {self.prompt: prompt}, self.prompt)
        try:
            answer = answer_text(_value(path, number, row, self.answer), self.answer_lists)
        except ValueError as error:
            raise rows.DamagedRow(path, number, self.answer, str(error)) from None
        prefix, pass_rate = self._prefix(path, number, row), self._pass_rate(path, number, row)
        metadata = self._metadata(row) if self.keeps_metadata else {}
        return Question(without_instructions(text), answer, prefix, pass_rate, system, metadata)

    def _metadata(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns without a role of their own, as far as JSON can hold them. An object of which a part has a role,
        such as the answer, is kept as a whole."""
        used = {self.prompt, self.answer, self.pass_rate, self.prefix}
        kept = {}
        for name, value in row.items():
            if name not in used and value is not None:
                try:
                    kept[name] = json.loads(json.dumps(value, default=_plain_value, allow_nan=False))
                except (TypeError, ValueError):  # such as bytes, or not a number
                    continue
        return kept

    def _prefix(self, path: Path, number: int, row: dict[str, Any]) -> str:
        prefix = _value(path, number, row, self.prefix) if self.prefix else ""
        if prefix is not None and not isinstance(prefix, str):
            raise rows.DamagedRow(path, number, self.prefix, f"must be a text, is {type(prefix).__name__}")
        return prefix or ""

    def _pass_rate(self, path: Path, number: int, row: dict[str, Any]) -> float | None:
        rate = _value(path, number, row, self.pass_rate) if self.pass_rate else None
        if rate is None or rate == "":  # an empty value of CSV
            return None
        if isinstance(rate, Decimal) or (isinstance(rate, str) and _DECIMAL.fullmatch(rate.strip())):
            rate = float(rate)  # all values in CSV are texts
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise rows.DamagedRow(path, number, self.pass_rate, f"must be a number from 0 to 1, is {rate!r:.60}")
        return float(rate)


def _plain_value(value: Any) -> Any:
    """Dates, times and decimal numbers as text."""
    if isinstance(value, date | time | Decimal):
        return str(value)
    raise TypeError


def _value(path: Path, number: int, row: Mapping[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = _object_in(value)
        if not isinstance(value, Mapping) or name not in value:
            raise data_files.missing_field(path, number, row, column)
        value = value[name]
    return value


def _object_in(value: Any) -> Any:
    """An object that is written as JSON text, as in CSV; other values are unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
