"""The kind of a data file, detected from its first bytes, because its name may be missing or wrong."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from minpro_megatron.errors import UserError

HEAD_BYTES = 4096
PARQUET = b"PAR1"

COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
# The kind of such a file, and how to convert it to a readable one. {path} is its name.
_OTHER_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer instead of the file; fetch it with: git lfs pull",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; decompress it with: zstd -d {path}",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save the sheet as CSV",
    b"\xff\xfe": "in UTF-16; convert it with: iconv -f UTF-16 -t UTF-8 {path}",
    b"\xfe\xff": "in UTF-16; convert it with: iconv -f UTF-16 -t UTF-8 {path}",
    b"ARROW1": "an Arrow file; write it as parquet, in Python: "
    "pyarrow.parquet.write_table(pyarrow.feather.read_table(NAME), NAME)",
    b"\xff\xff\xff\xff": "an Arrow stream, as save_to_disk of datasets writes it; write it as parquet, in Python: "
    "datasets.Dataset.from_file(NAME).to_parquet(NAME)",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"\x80\x04\x95": "a Python pickle, which could run a program when read; write its rows as JSON Lines",
    b"<!doctype html": "a web page instead of the file; download it with the address of the file itself",
    b"<html": "a web page instead of the file; download it with the address of the file itself",
}


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raises UserError with the kind and the remedy if a file that begins with `head` is of a known kind that cannot be
    read here."""
    for start, kind in _OTHER_KINDS.items():
        if head[: len(start)].lower() == start.lower():
            raise UserError(f"{path}: is {kind.format(path=path)}; parquet, JSON Lines, JSON arrays and CSV are read")


def head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def is_parquet(path: Path) -> bool:
    """By its content or its name, because the beginning of a damaged file may be lost. Raises UserError as
    refuse_other_kinds does."""
    head = head_of(path)
    refuse_other_kinds(path, head)
    return head.startswith(PARQUET) or path.suffix == ".parquet"


def open_text(path: Path) -> BinaryIO:
    """The file's bytes, decompressed if it is compressed. Raises UserError as refuse_other_kinds does."""
    head = head_of(path)
    opened = next((made for start, made in COMPRESSED.items() if head.startswith(start)), None)
    if opened is None:
        return path.open("rb")
    return opened(path)
