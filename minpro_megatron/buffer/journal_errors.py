"""Explanations and remedies for errors of the journal's file."""

import sqlite3
from pathlib import Path

from minpro_megatron.errors import ProjectError
from minpro_megatron.files.disk_space import free_bytes, is_full, no_space

REPLACE = (
    "restore a copy of the journal that belongs to the checkpoint, or start a new run (name=...) from the weights of "
    "the last checkpoint (`minpro export`)"
)
_FULL_BELOW_BYTES = 1 << 20  # free: a write of a few pages failed, and SQLite does not report the cause

FileError = sqlite3.Error | OSError | UnicodeDecodeError


class JournalError(ProjectError):
    """The journal cannot be opened or written, or a change of state does not fit its contents."""


def explained(path: Path, error: FileError) -> str:
    """The error in one line: the file, what is wrong with it, and what to do."""
    return f"{path}: {problem(path, error)}"


def problem(path: Path, error: FileError) -> str:
    """What is wrong with the file, and the remedy if one is known."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF  # the upper bits repeat it in more detail
    if is_full(error) or (code == sqlite3.SQLITE_IOERR and free_bytes(path) < _FULL_BELOW_BYTES):
        return f"{no_space(path)}; free some space, then launch again"
    if isinstance(error, UnicodeDecodeError) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"{error}: the file is damaged; {REPLACE}"  # SQLite's own message may contain text of the file
    if code == sqlite3.SQLITE_IOERR:
        return (
            f"{error}, though the disk is not full; check for a quota, a limit on the size of files (ulimit -f) or a "
            "broken disk (the system's log), then launch again"
        )
    return str(getattr(error, "strerror", None) or error)
