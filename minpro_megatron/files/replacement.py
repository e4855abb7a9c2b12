"""Replaces files and folders atomically: a reader sees the old content or the new one, never a part of it.

A folder that is written here contains a list of its files (`.minpro_files`). Only files in such a list are removed to
make room for a new folder, so that a wrong path cannot delete other files.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minpro_megatron.errors import UserError

LIST_OF_FILES = ".minpro_files"
_SHOWN = 3  # number of names in an error message


def replace_file(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old content or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, text)


def replace_file_in(folder: Path, name: str, text: str) -> None:
    """`replace_file` of `folder/name`, where `folder` must exist; a folder below it is created.

    Raises FileNotFoundError if `folder` does not exist: a process that outlives its run folder must not recreate it."""
    path = Path(folder) / name
    for parent in [*reversed(path.relative_to(folder).parents)][1:]:
        (Path(folder) / parent).mkdir(exist_ok=True)
    _write(path, text)


def write_secret(path: Path) -> str:
    """A new random text of 256 bits, in a file that only this user may read; an existing file is replaced. The folder
    of `path` is created, but not the folder above that."""
    secret = secrets.token_urlsafe(32)
    path.parent.mkdir(exist_ok=True)
    _write(path, secret, mode=0o600)
    return secret


def _write(path: Path, text: str, mode: int = 0o666) -> None:
    """`mode` as for os.open: the process's umask is taken off."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed: with its mode, whatever that was
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # it would use the last space of a full disk
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Context manager: a temporary folder that becomes `folder` if the block succeeds, and is removed otherwise.

    Raises ValueError as check_replaceable does, before the block and again at its end.
    """
    temporary = begin_folder(folder)
    try:
        yield temporary
        finish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin_folder(folder: Path) -> Path:
    """Creates the temporary folder in which the content of `folder` is written; finish_folder renames it. A temporary
    folder of an interrupted writer is removed.

    Raises ValueError as check_replaceable does, for both names.
    """
    check_replaceable(folder)
    temporary = folder.with_name(f".{folder.name}.partial")
    if temporary.exists():
        # The list is created first and written last.
        if not (temporary / LIST_OF_FILES).is_file() and any(temporary.iterdir()):
            raise UserError(f"{temporary}: this program did not write it but needs the name; move it elsewhere")
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    (temporary / LIST_OF_FILES).touch()
    return temporary


def finish_folder(temporary: Path, folder: Path) -> None:
    """Renames `temporary`, made by begin_folder, to `folder`; an existing `folder` is removed only after that."""
    check_replaceable(folder)
    replace_file(temporary / LIST_OF_FILES, "".join(f"{name}\n" for name in sorted(_files_in(temporary))))
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former")
    if folder.exists():
        folder.rename(former)
    temporary.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raises ValueError if `folder` exists and contains anything that this program did not write as a part of it.

    An empty folder may be replaced. The error names the first files that are in the way.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: this is a file; give another folder")
    found = _files_in(folder)
    listed = folder / LIST_OF_FILES
    own = set(listed.read_text(encoding="utf-8").splitlines()) if listed.is_file() else set()
    if others := sorted(found - own):
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise UserError(
            f"{folder}: it holds files that this program did not write there ({', '.join(others[:_SHOWN])}{more}), so "
            "it is not replaced; give another folder, or move them elsewhere"
        )


def _files_in(folder: Path) -> set[str]:
    """The paths below `folder` of everything that is not a folder, except the list itself."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(folder)) for path in found} - {LIST_OF_FILES}
