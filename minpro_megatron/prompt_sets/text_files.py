"""Rows of text files: JSON Lines, JSON arrays of objects, CSV with a header; also compressed with gzip, bzip2 or xz."""

import codecs
import csv
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minpro_megatron.errors import UserError
from minpro_megatron.prompt_sets import file_kinds
from minpro_megatron.prompt_sets.rows import DamagedRow, checked_object, json_lines, refuse_half_characters

DELIMITERS = {".csv": ",", ".tsv": "\t"}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")

Rows = Iterator[tuple[int, dict[str, Any]]]


def read_text_rows(path: Path) -> Rows:
    """Every `(row number from 1, row)`: the line number for JSON Lines; for CSV the header is not counted.

    JSON Lines and CSV are streamed, an array is read as a whole. The values of CSV are texts. Raises UserError for a
    file of another kind or a truncated one, DamagedRow for a damaged row.
    """
    try:
        with file_kinds.open_text(path) as file:
            yield from _rows(path, file)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be decompressed ({error}); is the file cut off? download it again") from error
    except OSError as error:
        if error.filename is not None or error.errno is not None:
            raise
        raise UserError(f"{path}: cannot be decompressed ({error}); download it again") from error


def _rows(path: Path, file: BinaryIO) -> Rows:
    head = file.read(file_kinds.HEAD_BYTES)
    file_kinds.refuse_other_kinds(path, head)
    if head.startswith(file_kinds.PARQUET):
        raise UserError(f"{path}: is a compressed parquet file; decompress it, and give the parquet file")
    file.seek(0)
    delimiter = DELIMITERS.get(Path(without_compression(path.name)).suffix)
    if delimiter is not None:
        yield from _csv_rows(path, file, delimiter)
        return
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if start == b"[" and (found := _whole_document(path, file)) is not None:
        yield from _elements(path, found)
        return
    file.seek(0)
    try:
        yield from json_lines(path, file)
    except DamagedRow:
        if start == b"{" and b"\n" in head:
            _refuse_one_object(path, file)
        raise


def without_compression(name: str) -> str:
    """`rows.jsonl` of `rows.jsonl.gz`."""
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _whole_document(path: Path, file: BinaryIO) -> Any:
    """The JSON value that is the whole file; None if there are several. Raises UserError if it is damaged."""
    try:
        return json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise UserError(f"{path}, line {error.lineno}: must be a JSON array of objects: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: must be a JSON array of objects: {error}") from error


def _elements(path: Path, found: Any) -> Rows:
    for number, row in enumerate(found, start=1):
        refuse_half_characters(path, number, row)
        yield number, checked_object(path, number, row)


def _refuse_one_object(path: Path, file: BinaryIO) -> None:
    """Raises UserError if the whole file is one object over several lines, which contains no known rows."""
    file.seek(0)
    try:
        found = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return
    raise UserError(
        f"{path}: is one JSON object with {', '.join(map(repr, found))[:200]}, not one object per line; if a field "
        f"contains the rows, extract them with: jq -c '.FIELD[]' {path} > rows.jsonl"
    )


def _csv_rows(path: Path, file: BinaryIO, delimiter: str) -> Rows:
    csv.field_size_limit(sys.maxsize)
    number = 0
    try:
        reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise UserError(f"{path}: two columns have the same name; the header is {', '.join(header)}")
        for fields in reader:
            if not fields:
                continue
            number += 1
            if len(fields) != len(header):
                rule = f"has {len(fields)} values, the header has {len(header)} columns ({', '.join(header)})"
                raise DamagedRow(path, number, "(whole row)", rule)
            yield number, dict(zip(header, fields, strict=True))
    except UnicodeError as error:
        raise DamagedRow(path, number + 1, "(whole row)", f"must be UTF-8: {error}") from error
    except csv.Error as error:
        raise DamagedRow(path, number + 1, "(whole row)", f"must be CSV: {error}") from error
