"""The scalars of a run in `run_dir/metrics.jsonl`: one JSON line per call of `RunWriter.scalars`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "metrics.jsonl"
_OF_EVALUATIONS = ("eval/", "evaluation/")
_OF_PUBLICATIONS = ("publish/", "alarms/")


def is_of_evaluations(name: str) -> bool:
    """Whether a metric belongs to evaluations, which are written on their own, by policy version."""
    return name.startswith(_OF_EVALUATIONS)


@dataclass(frozen=True, slots=True)
class Entry:
    """The scalars written together at one step; `time` is the Unix time in seconds."""

    step: int
    time: float
    metrics: Mapping[str, float]

    @property
    def is_of_publication(self) -> bool:
        """Whether these are scalars of a publication that came after the record of its global step, as on GPUs that
        trainer and servers share."""
        return all(name.startswith(_OF_PUBLICATIONS) for name in self.metrics)

    @property
    def is_global_step(self) -> bool:
        """Whether these are the scalars of a trained global step; evaluations are written on their own, and
        publications that come after the step add to them."""
        return not self.is_of_publication and not all(map(is_of_evaluations, self.metrics))


def encode_entry(entry: Entry) -> str:
    """The entry as one line of strict JSON: numbers that are not finite become null."""
    metrics = {name: number if math.isfinite(number) else None for name, number in entry.metrics.items()}
    return json.dumps({"step": entry.step, "time": entry.time, "metrics": metrics}, allow_nan=False) + "\n"


def decode_entry(line: str | bytes) -> Entry:
    """The entry in `line`; null becomes NaN. Raises ValueError if the line is not valid."""
    try:
        content = json.loads(line)
        metrics = {
            str(name): math.nan if number is None else float(number) for name, number in content["metrics"].items()
        }
        return Entry(step=int(content["step"]), time=float(content["time"]), metrics=metrics)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a line of {FILE_NAME}: {line[:80]!r}") from error


class LineTail:
    """Follows a file while another process appends lines to it."""

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._offset = 0

    def new_lines(self) -> list[str]:
        """The complete lines added since the last call; an incomplete last line is returned once it is complete. All
        lines, if the file was replaced by a shorter one."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        complete = added[: added.rfind(b"\n") + 1]
        self._offset += len(complete)
        return complete.decode("utf-8", errors="replace").splitlines()


class HistoryTail:
    """Follows metrics.jsonl while another process appends to it."""

    def __init__(self, run_dir: Path) -> None:
        self._tail = LineTail(Path(run_dir) / FILE_NAME)

    def new_entries(self) -> list[Entry]:
        """The entries added since the last call; an incomplete last line is returned once it is complete."""
        entries = []
        for line in self._tail.new_lines():
            try:
                entries.append(decode_entry(line))
            except ValueError:
                continue  # an incomplete line, left by a process that was killed while writing
        return entries


def read_history(run_dir: Path) -> list[Entry]:
    """The run's entries, ordered by step. Of a step that was trained again after a restart only the last entry
    counts; the evaluations of a policy version are one entry, and so are a step and its publication."""
    latest: dict[tuple[bool, int], Entry] = {}
    for entry in HistoryTail(run_dir).new_entries():
        key = entry.is_global_step or entry.is_of_publication, entry.step
        if not entry.is_global_step and key in latest:
            former = latest[key]
            time = former.time if entry.is_of_publication else entry.time
            entry = Entry(entry.step, time, {**former.metrics, **entry.metrics})
        latest[key] = entry
    return sorted(latest.values(), key=lambda entry: (entry.step, entry.is_global_step))
