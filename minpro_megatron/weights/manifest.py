"""The manifest of a Megatron weight folder: what the weights are, and the checksum of every file beside it.

It is written last, so a folder with a manifest is complete. The format of Megatron's distributed checkpoints has two
places for pickles: `.metadata`, and the objects among the tensors. Checksums tell a damaged or mixed up folder from
the one that was written; they cannot tell who wrote it. sharded_files.py therefore also refuses to unpickle anything
but the classes that metadata is made of.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from minpro_megatron.config.base import Section
from minpro_megatron.monitor.files import replace_file
from minpro_megatron.weights.architecture import Architecture

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
HF_TEXTS = "hf"  # config, tokenizer and index of the model that the weights came from
# Files of at most this size are verified whenever the folder is opened; of larger ones only the size, for speed.
_ALWAYS_VERIFIED_BYTES = 64 << 20


class FileRecord(Section):
    """One file as it was written."""

    bytes: int = Field(ge=0)
    sha256: str


class Manifest(Section):
    format_version: Literal[2] = FORMAT_VERSION
    source: str = Field(description="the name of the folder that the weights came from")
    dtype: Literal["float32", "bfloat16"]
    architecture: Architecture
    files: dict[str, FileRecord] = Field(description="by path below the folder; all but the manifest")


class Checksums:
    """SHA-256 of files, computed in a thread beside the work that writes the next one."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._pool = pool
        self._pending: dict[str, Future[FileRecord]] = {}

    def add(self, name: str) -> None:
        """`name` (below the folder) is complete."""
        self._pending[name] = self._pool.submit(record_file, self._folder / name)

    def records(self) -> dict[str, FileRecord]:
        """All of them; waits for those still computed."""
        return {name: self._pending[name].result() for name in sorted(self._pending)}


@contextmanager
def checksums(folder: Path) -> Iterator[Checksums]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksum") as pool:
        yield Checksums(folder, pool)


def record_file(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    replace_file(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the folder. Raises ValueError if there is none, or it is not a finished one of this version."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"model.megatron_path = {folder}: there is no {MANIFEST}; run tools/convert_checkpoint.py first"
        )
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        shown = f" = {first['input']}" if first["loc"] and isinstance(first["input"], int | str) else ""
        raise ValueError(f"{file}: {field}{shown}: {first['msg']}; convert again") from None


def check_architecture(folder: str | Path, manifest: Manifest, architecture: Architecture) -> None:
    """Raises ValueError naming the first size in which the weights differ from `architecture`."""
    wanted = asdict(architecture)
    for field, value in asdict(manifest.architecture).items():
        if wanted[field] != value:
            raise ValueError(
                f"{Path(folder) / MANIFEST}: {field} = {value}, but the Hugging Face config.json says {wanted[field]}; "
                "convert that model"
            )


def verify_files(
    folder: str | Path,
    manifest: Manifest,
    thoroughly: bool = False,
    announce: Callable[[int], None] = lambda _: None,
) -> None:
    """Raises ValueError naming the first file that is not as written: by size, and small files by checksum too, which
    are the ones that hold pickles in a converted folder. `thoroughly`: all by checksum. `announce(bytes)` a file."""
    for name, record in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise ValueError(f"{path}: {found}, but {MANIFEST} says {record.bytes} bytes; convert again")
        if (thoroughly or record.bytes <= _ALWAYS_VERIFIED_BYTES) and record_file(path) != record:
            raise ValueError(f"{path}: its SHA-256 is not the one in {MANIFEST}; convert again")
        announce(record.bytes)


def sha256_lines(records: dict[str, FileRecord]) -> Iterable[str]:
    """Lines for `sha256sum --check`."""
    return (f"{record.sha256}  {name}\n" for name, record in records.items())
