"""Reads JSON files of a run that may be incomplete: a killed process may have left half a line, or no file."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty if the file does not exist or contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in the file's lines; a line that is not an object (half a line of a killed process) is skipped."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found: list[Any] = []
    for line in text.split("\n"):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [content for content in found if isinstance(content, dict)]
