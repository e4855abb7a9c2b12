"""Small text files that other processes read while they are being replaced."""

import os
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
