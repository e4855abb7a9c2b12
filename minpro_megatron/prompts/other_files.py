"""Recognizes files that were given as prompt files but have another format, and names the command to convert them."""

import codecs
from pathlib import Path
from typing import Any

import msgspec

# By the first bytes. Everything but the last is read by `minpro prepare`.
_KINDS = {
    b"PAR1": "a parquet file",
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
}
_GIT_LFS = b"version https://git-lfs"
_TABLES = {".csv": "a CSV file", ".tsv": "a table"}
_FIELDS = ("id", "source", "prompt", "answer")


def prepare_command(path: Path) -> str:
    return (
        f"make a prompt file of it with: minpro prepare custom --input {path} --prompt-column COLUMN "
        "--answer-column COLUMN --output FILE.jsonl"
    )


def problem_of_kind(path: Path, head: bytes) -> str | None:
    """The kind of the file that starts with `head`, and the remedy; None if it may be JSON Lines."""
    if head.startswith(_GIT_LFS):
        return "it is a Git LFS pointer instead of the file; fetch it with: git lfs pull"
    kind = next((name for start, name in _KINDS.items() if head.startswith(start)), _TABLES.get(path.suffix))
    if kind is None and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        kind = "a JSON array"
    return None if kind is None else f"it is {kind}, but a prompt file is JSON Lines; {prepare_command(path)}"


def problem_of_schema(path: Path, line: bytes) -> str | None:
    """What is wrong with a row of another schema, and the remedy. None for a row that has all fields as texts, or is
    not an object."""
    try:
        row: Any = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(row, dict) or all(isinstance(row.get(field), str) for field in _FIELDS):
        return None
    return (
        f"the row has the fields {', '.join(row)}; a prompt file has {', '.join(_FIELDS)}, all of them texts; correct "
        f"the row, or {prepare_command(path)}"
    )
