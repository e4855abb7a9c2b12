"""Prompt sets as JSON Lines: reading rows with errors that name the location, and atomic writing."""

import codecs
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minpro_megatron.errors import UserError

PROMPT_FIELDS = ("id", "source", "prompt", "answer")
OPTIONAL_FIELDS = ("pass_rate", "prefix", "system", "metadata")


class DamagedRow(UserError):
    """A row of an input file that breaks a rule. The message names the file, row number, field and rule."""

    def __init__(self, path: Path, row_number: int, field: str, rule: str) -> None:
        super().__init__(f"{path}, row {row_number}, field {field}: {rule}")


class MissingField(DamagedRow):
    """A row has no field of this name; the message lists the fields that it has, those in objects with a dot."""

    def __init__(self, path: Path, row_number: int, field: str, present: Iterable[str]) -> None:
        self.present = ", ".join(present) or "no field"
        super().__init__(path, row_number, field, f"is missing; there is {self.present}")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every `(line number from 1, object)` of a JSON Lines file; blank lines are skipped.

    Raises DamagedRow for a line that is not UTF-8, not JSON or not an object.
    """
    with path.open("rb") as file:
        yield from json_lines(path, file)


def json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """As read_jsonl, for lines that were read from `path`."""
    for row_number, line in enumerate(lines, start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if row_number == 1 else line
        if text.strip():
            yield row_number, _json_object(path, row_number, text)


def _json_object(path: Path, row_number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeError as error:
        raise DamagedRow(path, row_number, "(whole row)", f"must be UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:  # also for numerals of thousands of digits, and deep nesting
        raise DamagedRow(path, row_number, "(whole row)", f"must be one JSON object: {error}") from error
    if b"\\u" in line:
        refuse_half_characters(path, row_number, row)
    return checked_object(path, row_number, row)


def refuse_half_characters(path: Path, row_number: int, row: Any) -> None:
    """Raises DamagedRow for half of a surrogate pair, which JSON can express but no text can contain."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise DamagedRow(path, row_number, "(whole row)", f"must be UTF-8: {error}") from error


def checked_object(path: Path, row_number: int, row: Any) -> dict[str, Any]:
    """`row`; raises DamagedRow unless it is a JSON object."""
    if not isinstance(row, dict):
        raise DamagedRow(path, row_number, "(whole row)", f"must be one JSON object, is {type(row).__name__}")
    return row


def names_in(row: Mapping[str, Any]) -> list[str]:
    """The fields of a row; those of objects in it have a dot: `reward_model.ground_truth`."""
    return [
        f"{name}.{inner}" if inner else name
        for name, value in row.items()
        for inner in (names_in(value) if isinstance(value, Mapping) and value else [""])
    ]


def text_field(path: Path, row_number: int, row: dict[str, Any], field: str) -> str:
    """The non-empty text `row[field]`; raises DamagedRow where it is missing, of another type or empty."""
    if field not in row:
        raise MissingField(path, row_number, field, names_in(row))
    value = row[field]
    if not isinstance(value, str):
        raise DamagedRow(path, row_number, field, f"must be a text, is {type(value).__name__}")
    if not value.strip():
        raise DamagedRow(path, row_number, field, "must not be empty")
    return value


def write_prompts(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes prompt rows sorted by id, replacing `path` in one step; parent folders are created.

    The same rows give the same bytes in any order.
    """
    rows = sorted(rows, key=lambda row: row["id"])
    assert all(_is_prompt_row(tuple(row)) for row in rows), f"prompt rows have {PROMPT_FIELDS}, {OPTIONAL_FIELDS}"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.chmod(partial, 0o644)  # mkstemp's 0600 would hide the file from the other users of a cluster
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _is_prompt_row(fields: tuple[str, ...]) -> bool:
    return fields[:4] == PROMPT_FIELDS and set(fields[4:]) <= set(OPTIONAL_FIELDS)
