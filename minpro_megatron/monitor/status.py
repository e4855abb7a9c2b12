"""The current phase of each role, as `run_dir/status/<role>.json`: for displays only, never for control."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.files.replacement import replace_file_in

# The name under which the collector reports that no server responds, and the beginning of this phase: always shown.
SERVERS, NO_SERVER = "servers", "no server"


@dataclass(frozen=True, slots=True)
class Status:
    """A role's phase ("loading the model", "step 7", ...) and the Unix time in seconds when it began."""

    phase: str
    time: float


def write_status(run_dir: Path, role: str, phase: str) -> None:
    """Writes that `role` has just entered `phase`. Raises FileNotFoundError if the run folder does not exist."""
    content = json.dumps({"phase": phase, "time": time.time()})
    replace_file_in(Path(run_dir), f"status/{role}.json", content + "\n")


def read_statuses(run_dir: Path) -> dict[str, Status]:
    """The last status of every role that has written one; damaged files are skipped."""
    statuses = {}
    for path in sorted((Path(run_dir) / "status").glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            statuses[path.stem] = Status(phase=str(content["phase"]), time=float(content["time"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a file that a terminated process left incomplete must not stop the display
    return statuses
