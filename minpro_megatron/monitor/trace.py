"""A timeline of a run's processes during some global steps, for ui.perfetto.dev or chrome://tracing.

Every process records its own spans into a file of `run_dir/trace/<incarnation>/`; `write_trace` merges them on one
axis, the wall clock, into `run_dir/trace.json` (Chrome's Trace Event Format). Between machines the axis is as accurate
as their clocks. A span is time of the host: kernels on a GPU may continue after it (debug.profile_steps shows those).
"""

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from minpro_megatron.files.replacement import replace_file
from minpro_megatron.monitor.watchdog import Watchdog

log = logging.getLogger(__name__)

FOLDER = "trace"
FILE_NAME = "trace.json"


class Span(NamedTuple):
    """An activity of a process from `start_ns` to `end_ns` of the wall clock, in nanoseconds since 1970."""

    process: str  # such as "trainer rank 0"
    track: str  # a row of the process in the timeline
    parallel: bool  # spans of the track overlap independently of each other; otherwise they nest
    name: str
    start_ns: int
    end_ns: int
    arguments: dict[str, Any]


class Tracer(Protocol):
    """Records the phases of the trainer; `NoTracer` records nothing."""

    def step(self, step: int) -> None:
        """Marks the begin of global step `step` and the end of the previous one."""
        ...

    def span(self, name: str) -> AbstractContextManager[None]:
        """Records the block as a span `name`. Spans nest."""
        ...

    def close(self) -> None:
        """Marks the end of the last step."""
        ...


class NoTracer:
    _NOTHING = nullcontext()

    def step(self, step: int) -> None:
        pass

    def span(self, name: str) -> AbstractContextManager[None]:
        return self._NOTHING

    def close(self) -> None:
        pass


class Recorder:
    """Records the spans of one process that lie, at least in part, in global steps `steps`.

    `step` marks their begin and end, and writes the spans recorded so far. Only one thread may use an object.
    """

    def __init__(
        self, run_dir: Path, incarnation: int, process: str, steps: range, *, of_step: str = "", merges: bool = False
    ) -> None:
        """`of_step` names a span around each step, such as "global step"; "" records none. `merges`: this process also
        writes trace.json, one step after the last of `steps` and at its end."""
        self._run_dir = Path(run_dir)
        self._folder = self._run_dir / FOLDER / str(incarnation)
        self._process = process
        self._steps = steps
        self._of_step = of_step
        self._merges = merges
        self._offset_ns = 0  # from the clock of the spans to the wall clock
        self._opened_ns: int | None = None
        self._closed_ns: int | None = None
        self._step: tuple[int, int] | None = None  # the current step and its start
        self._spans: list[Span] = []

    @staticmethod
    def now() -> int:
        """Nanoseconds of a monotonic clock."""
        return time.perf_counter_ns()

    def step(self, step: int) -> None:
        if self._step is not None and self._step[0] == step:
            return
        self._end_step()
        now = self.now()
        if step in self._steps:
            if self._opened_ns is None:
                self._opened_ns, self._offset_ns = now, time.time_ns() - now
            self._step = (step, now)
        elif self._opened_ns is not None and self._closed_ns is None:
            self._closed_ns = now
        elif self._closed_ns is not None and self._merges:
            # by now every other process has ended the last of the steps and has written its spans
            self._merges = False
            self.flush()
            write_trace(self._run_dir)
        self.flush()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.add(name, start, self.now())

    def add(
        self, name: str, start: int, end: int, *, process: str = "", track: str = "", parallel: bool = False,
        **arguments: object,
    ) -> None:  # fmt: skip
        """Records a span from `start` to `end` (values of `now`), also of another `process` that this one observes."""
        if (
            self._opened_ns is None
            or end < self._opened_ns
            or (self._closed_ns is not None and start > self._closed_ns)
        ):
            return
        start, end = start + self._offset_ns, end + self._offset_ns
        self._spans.append(Span(process or self._process, track, parallel, name, start, end, arguments))

    def _end_step(self) -> None:
        if self._step is not None and self._of_step:
            self.add(f"{self._of_step} {self._step[0]}", self._step[1], self.now())
        self._step = None

    def flush(self) -> None:
        """Writes the spans recorded so far. If the disk is full, spans are lost and the run continues."""
        if not self._spans:
            return
        lines = "".join(json.dumps(span) + "\n" for span in self._spans)
        self._spans.clear()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"{self._process.replace(' ', '-')}.jsonl").open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            log.warning("some spans of %s are missing from the trace: %s", self._process, error)

    def close(self) -> None:
        self._end_step()
        self.flush()
        if self._opened_ns is not None:
            write_trace(self._run_dir)


class TracedWatchdog(Watchdog):
    """A watchdog that also records the guarded blocks as spans."""

    def __init__(
        self, path: Path, timeout_s: float, tracer: Tracer, record: Callable[[], Sequence[Path]] = tuple
    ) -> None:
        super().__init__(path, timeout_s, record=record)
        self._tracer = tracer

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        with self._tracer.span(what), super().guard(what):
            yield


def write_trace(run_dir: Path) -> Path | None:
    """Writes `run_dir/trace.json` from the spans that the processes of the newest traced incarnation have written so
    far. Returns its path; None if there are none, or if it cannot be written."""
    folders = [path for path in (Path(run_dir) / FOLDER).glob("*") if path.name.isdecimal()]
    if not folders:
        return None
    newest = max(folders, key=lambda path: int(path.name))
    path = Path(run_dir) / FILE_NAME
    try:
        spans = [span for file in sorted(newest.glob("*.jsonl")) for span in _read_spans(file)]
        replace_file(path, json.dumps(chrome_trace(spans)) + "\n")
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)
        return None
    return path


def _read_spans(path: Path) -> Iterator[Span]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield Span(*json.loads(line))
        except (ValueError, TypeError):
            continue  # an incomplete line of a process that was killed or is writing it now


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """The spans in Chrome's Trace Event Format: a complete event (ph X) each, times in microseconds from the first.

    Overlapping spans on one thread of this format must nest, so the spans of a parallel track are distributed over as
    many threads as overlap.
    """
    ordered = sorted(spans, key=lambda span: (_natural(span.process), span.track, span.start_ns, -span.end_ns))
    first_ns = min((span.start_ns for span in ordered), default=0)
    by_process: dict[str, dict[str, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for span in ordered:
        by_process[span.process][span.track].append(span)
    events: list[dict[str, Any]] = []
    for pid, (process, tracks) in enumerate(by_process.items(), start=1):
        events.append(_metadata("process_name", pid, 0, name=process))
        events.append(_metadata("process_sort_index", pid, 0, sort_index=pid))
        first_tid = 1
        for track, of_track in tracks.items():
            lanes = _lanes(of_track)
            for tid in range(first_tid, first_tid + max(lanes) + 1):
                number = f" {tid - first_tid + 1}" if max(lanes) else ""
                events.append(_metadata("thread_name", pid, tid, name=(track or process) + number))
                events.append(_metadata("thread_sort_index", pid, tid, sort_index=tid))
            events += [
                _complete(span, pid, first_tid + lane, first_ns) for span, lane in zip(of_track, lanes, strict=True)
            ]
            first_tid += max(lanes) + 1
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"start": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(first_ns / 1e9))},
    }


def _natural(process: str) -> tuple[int, list[tuple[int, str]]]:
    """The trainer's ranks first, then the collector and its servers, each in numerical order."""
    parts = re.findall(r"\d+|\D+", process)
    return int(not process.startswith("trainer")), [(int(p) if p.isdecimal() else -1, p) for p in parts]


def _lanes(spans: list[Span]) -> list[int]:
    """For each span of one track, ordered by start, the lowest lane in which it starts after the previous spans or,
    unless it is parallel, lies within the innermost open span."""
    lanes: list[list[int]] = []  # the ends of the open spans of each lane, innermost last
    chosen = []
    for span in spans:
        for ends in lanes:
            while ends and ends[-1] <= span.start_ns:
                ends.pop()
        fitting = (n for n, ends in enumerate(lanes) if not ends or (not span.parallel and span.end_ns <= ends[-1]))
        lane = next(fitting, len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append(span.end_ns)
        chosen.append(lane)
    return chosen


def _complete(span: Span, pid: int, tid: int, first_ns: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.track or "trainer",
        "pid": pid,
        "tid": tid,
        "ts": (span.start_ns - first_ns) / 1000,
        "dur": (span.end_ns - span.start_ns) / 1000,
        "args": span.arguments,
    }


def _metadata(kind: str, pid: int, tid: int, **arguments: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": arguments}
