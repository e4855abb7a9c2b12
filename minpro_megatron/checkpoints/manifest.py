"""The manifest of a Megatron weight folder: what the weights are, and the checksum of every other file in the folder.

It is written last, so a folder with a manifest is complete. Megatron's distributed checkpoints contain pickles in two
places: in `.metadata`, and as objects among the tensors. Checksums detect a folder that is damaged or has files of
another one; they cannot show who wrote it. sharded_files.py therefore also refuses to unpickle any class that metadata
does not need.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from minpro_megatron.checkpoints.resume_point import RunManifest
from minpro_megatron.checkpoints.run_checkpoint import is_run_checkpoint, read_run_manifest
from minpro_megatron.config.base import Section
from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.models.architecture import Architecture

MANIFEST = "manifest.json"
METADATA = ".metadata"
FORMAT_VERSION = 2
HF_TEXTS = "hf"  # config, tokenizer and index of the model that the weights came from
# Files of at most this size are verified whenever the folder is opened; for larger files only the size, for speed.
_ALWAYS_VERIFIED_BYTES = 64 << 20
_SMALL_WRITE = 1 << 16  # bytes; for smaller writes a thread costs more time than it saves


class FileRecord(Section):
    """One file as it was written."""

    bytes: int = Field(ge=0)
    sha256: str


class Manifest(Section):
    format_version: Literal[2] = FORMAT_VERSION
    source: str = Field(description="the name of the folder that the weights came from")
    dtype: Literal["float32", "bfloat16"]
    architecture: Architecture
    files: dict[str, FileRecord] = Field(description="by path relative to the folder; all files except the manifest")


class RecordedFile:
    """A file being written. Large writes are hashed in a thread at the same time: both release Python's GIL."""

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._pool = pool

    def write(self, data: bytes | memoryview) -> int:
        if len(data) < _SMALL_WRITE:
            self._digest.update(data)
            return self._file.write(data)
        hashing = self._pool.submit(self._digest.update, data)
        try:
            return self._file.write(data)
        finally:
            hashing.result()  # torch.save frees `data` after this call

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> FileRecord:
        size = self._file.tell()
        self._file.close()
        return FileRecord(bytes=size, sha256=self._digest.hexdigest())


class FileRecords:
    """The files written into a folder, with checksums, without reading any large file again."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._pool = pool
        self._open: dict[str, RecordedFile] = {}
        self._records: dict[str, FileRecord] = {}

    def create(self, name: str) -> RecordedFile:
        """A new file of the folder; close it with the `close` of this object."""
        self._open[name] = RecordedFile(self._folder / name, self._pool)
        return self._open[name]

    def close(self, name: str) -> None:
        self._records[name] = self._open.pop(name).close()

    def add(self, name: str) -> None:
        """Records a small file of the folder that other code wrote."""
        self._records[name] = record_file(self._folder / name)

    def abandon(self) -> None:
        """Closes files that an error left open: a removed file uses disk space until it is closed."""
        while self._open:
            with suppress(OSError):  # the buffered data may not fit on the disk
                self._open.popitem()[1].close()

    def records(self) -> dict[str, FileRecord]:
        assert not self._open, f"still open: {', '.join(self._open)}"
        return dict(sorted(self._records.items()))


@contextmanager
def file_records(folder: Path) -> Iterator[FileRecords]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksum") as pool:
        records = FileRecords(folder, pool)
        try:
            yield records
        except BaseException:
            records.abandon()
            raise


def record_file(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    replace_file(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the folder, which is a converted model or a run's checkpoint. Raises UserError if there is none,
    or it is not a complete manifest of this version."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{folder}: there is no {MANIFEST}, so this is not a complete Megatron checkpoint; run `minpro convert`"
        )
    if is_run_checkpoint(file.parent):
        return _as_weights(read_run_manifest(file.parent))
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        shown = f" = {first['input']}" if first["loc"] and isinstance(first["input"], int | str) else ""
        raise UserError(f"{file}: {field}{shown}: {first['msg']}; convert again") from None


def _as_weights(manifest: RunManifest) -> Manifest:
    """The manifest of the weights in a run's checkpoint; its files include those of the optimizer's state."""
    content = {
        "source": manifest.folder_name,
        "dtype": manifest.run.dtype,
        "architecture": manifest.run.architecture,
        "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in manifest.files.items()},
    }
    return Manifest.model_validate_json(json.dumps(content))


def check_architecture(folder: str | Path, manifest: Manifest, architecture: Architecture) -> None:
    """Raises ValueError that names the first size in which the weights differ from `architecture`."""
    wanted = asdict(architecture)
    for field, value in asdict(manifest.architecture).items():
        if wanted[field] != value:
            raise UserError(
                f"{Path(folder) / MANIFEST}: {field} = {value}, but the Hugging Face config.json says {wanted[field]}; "
                "convert that model"
            )


def verify_files(
    folder: str | Path,
    manifest: Manifest,
    thoroughly: bool = False,
    announce: Callable[[int], None] = lambda _: None,
) -> None:
    """Raises ValueError that names the first file that has changed since it was written. Sizes are compared, and also
    the checksums of the metadata and of small files, which contain the pickles of a converted folder. `thoroughly`:
    the checksums of all files. `announce(bytes)` is called for each file."""
    for name, record in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise UserError(f"{path}: {found}, but {MANIFEST} says {record.bytes} bytes; convert again")
        always = name == METADATA or record.bytes <= _ALWAYS_VERIFIED_BYTES
        if (thoroughly or always) and record_file(path) != record:
            raise UserError(f"{path}: its SHA-256 is not the one in {MANIFEST}; convert again")
        announce(record.bytes)


def sha256_lines(records: dict[str, FileRecord]) -> Iterable[str]:
    """Lines for `sha256sum --check`."""
    return (f"{record.sha256}  {name}\n" for name, record in records.items())
