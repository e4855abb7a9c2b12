"""Files and folders that are replaced whole: a reader sees the old content or the new one, never a part of it."""

import os
import shutil
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old content or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_replaceable(folder: Path, marker: str) -> None:
    """Raises ValueError if `folder` exists and is not what a former run wrote (it has a file `marker`) or empty."""
    if folder.exists() and not (folder.is_dir() and ((folder / marker).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder}: exists and has no {marker}, so it is not overwritten; give another folder")


def replace_folder(finished: Path, folder: Path, marker: str) -> None:
    """`finished` becomes `folder`; a former `folder` is removed only after. Raises as check_replaceable does."""
    check_replaceable(folder, marker)
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former")
    if folder.exists():
        folder.rename(former)
    finished.rename(folder)
    shutil.rmtree(former, ignore_errors=True)
