"""Host memory of the roles: each writes its own into the run folder, and the trainer's rank 0 reads them."""

import json
import os
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from minpro_megatron.files.replacement import replace_file_in

FOLDER = "memory"
EVERY_S = 5.0


def own_host_bytes() -> int:
    """Resident memory of this process."""
    return _process(os.getpid()).memory_info().rss


@cache  # constructing the object takes longer than reading the memory
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def host_bytes() -> int:
    """Resident memory of this process and its descendants; a shared page counts for each process. Scans all
    processes of the machine."""
    total, process = 0, psutil.Process()
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += one.memory_info().rss
    return total


class MemoryStatement:
    """The memory of a role's processes on this machine, written to `run_dir/memory/<name>@<machine>.json`. Call `tick`
    often."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """`name`: the role, or the role and the number of its part: serve, or serve-4."""
        self._run_dir = Path(run_dir)
        self._name = f"{FOLDER}/{name}@{socket.gethostname()}.json"
        self._next = 0.0

    def tick(self) -> None:
        """Writes the memory about every EVERY_S seconds. Errors of the disk are ignored."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY_S
            with suppress(OSError):
                replace_file_in(self._run_dir, self._name, json.dumps({"host_bytes": host_bytes()}) + "\n")


def stated_host_bytes(run_dir: Path) -> dict[str, float]:
    """The last written values by role, summed over its parts and machines, as metrics; damaged files are skipped."""
    found: dict[str, float] = {}
    for path in sorted((Path(run_dir) / FOLDER).glob("*@*.json")):
        role = path.name.partition("@")[0].partition("-")[0]
        name = f"memory/host_bytes/{role}"
        with suppress(OSError, ValueError, KeyError, TypeError):
            found[name] = found.get(name, 0.0) + float(json.loads(path.read_text(encoding="utf-8"))["host_bytes"])
    return found
