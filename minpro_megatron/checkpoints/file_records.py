"""Files with their checksums: recorded while they are written, and verified when a folder of weights is opened.

Megatron's distributed checkpoints contain pickles in two places: in `.metadata`, and as objects among the tensors.
Checksums detect a folder that is damaged or has files of another one; they cannot show who wrote it. sharded_files.py
therefore also refuses to unpickle any class that metadata does not need.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from minpro_megatron.checkpoints.manifest import MANIFEST, METADATA, FileRecord, Manifest
from minpro_megatron.errors import UserError

# Files of at most this size are verified whenever the folder is opened; for larger files only the size, for speed.
_ALWAYS_VERIFIED_BYTES = 64 << 20
_SMALL_WRITE = 1 << 16  # bytes; for smaller writes a thread costs more time than it saves


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
