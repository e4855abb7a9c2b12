"""What each role is doing, as `run_dir/status/<role>.json`: for the people watching, never for control."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.files.replacement import replace_file_in

# The name under which the collector states that no server answers, and how such a phase begins: shown at any time.
SERVERS, NO_SERVER = "servers", "no server"


@dataclass(frozen=True, slots=True)
class Status:
    """A role's phase ("loading the model", "step 7", ...) and the Unix time in seconds when it began."""

    phase: str
    time: float


def write_status(run_dir: Path, role: str, phase: str) -> None:
    """States that `role` has just entered `phase`. Raises FileNotFoundError where the run folder is gone."""
    content = json.dumps({"phase": phase, "time": time.time()})
    replace_file_in(Path(run_dir), f"status/{role}.json", content + "\n")


def read_statuses(run_dir: Path) -> dict[str, Status]:
    """The last status of every role that has written one; a damaged file is left out."""
    statuses = {}
    for path in sorted((Path(run_dir) / "status").glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            statuses[path.stem] = Status(phase=str(content["phase"]), time=float(content["time"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the display must not fail over a file that a dying process left
    return statuses
