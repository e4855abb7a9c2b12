"""Errors for full file systems: they state the location, the bytes needed and the bytes free."""

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minpro_megatron.errors import ProjectError

SHARED_MEMORY = Path("/dev/shm")  # the file system of POSIX shared memory on Linux
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(ProjectError):
    """A file system has no space left, or a quota is used up."""


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def free_bytes(path: Path) -> int:
    """The free bytes of the file system of `path`, which need not exist."""
    return shutil.disk_usage(existing_parent(path)).free


def as_size(num_bytes: int) -> str:
    """`1.5 GB`, `12.0 MB` or `3.1 kB`, in powers of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} kB"


def is_full(error: BaseException | None) -> bool:
    """Whether the error, or one of its causes, means that a file system is full or a quota is used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def no_space(path: Path, num_bytes: int | None = None) -> str:
    """A message with the file system of `path`, its free bytes, and the bytes needed if they are known."""
    needed = "" if num_bytes is None else f", {as_size(num_bytes)} needed"
    return (
        f"no space is left on the file system of {existing_parent(path)}, or a quota is used up: "
        f"{as_size(free_bytes(path))} free{needed}"
    )


@contextmanager
def naming_full_disk(path: Path, what: str, remedy: str, num_bytes: int | None = None) -> Iterator[None]:
    """Context manager: if the block fails because the file system of `path` is full, raises a DiskFullError with one
    line that names `what` was written and the remedy. Space that the block has freed again counts as free."""
    try:
        yield
    except ProjectError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise DiskFullError(f"{what}: {no_space(path, num_bytes)}; free some space or {remedy}") from error
