"""How much host memory the roles hold: each states its own in the run folder, the trainer's rank 0 reads them."""

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


@cache  # to find out which process it is takes longer than to read its memory
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def host_bytes() -> int:
    """Resident memory of this process and its descendants; a page that several share counts for each. Looks at all
    processes of the machine."""
    total, process = 0, psutil.Process()
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += one.memory_info().rss
    return total


class MemoryStatement:
    """A role's processes on this machine, stated in `run_dir/memory/<name>@<machine>.json`. Call `tick` often."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """`name` is the role's, or the role's and a share of it: serve, or serve-4."""
        self._run_dir = Path(run_dir)
        self._name = f"{FOLDER}/{name}@{socket.gethostname()}.json"
        self._next = 0.0

    def tick(self) -> None:
        """States it about every EVERY_S. A disk that is full for a moment is no reason to fail."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY_S
            with suppress(OSError):
                replace_file_in(self._run_dir, self._name, json.dumps({"host_bytes": host_bytes()}) + "\n")


def stated_host_bytes(run_dir: Path) -> dict[str, float]:
    """The last statements by role, summed over its shares and machines, as metrics; a damaged one is left out."""
    found: dict[str, float] = {}
    for path in sorted((Path(run_dir) / FOLDER).glob("*@*.json")):
        role = path.name.partition("@")[0].partition("-")[0]
        name = f"memory/host_bytes/{role}"
        with suppress(OSError, ValueError, KeyError, TypeError):
            found[name] = found.get(name, 0.0) + float(json.loads(path.read_text(encoding="utf-8"))["host_bytes"])
    return found
