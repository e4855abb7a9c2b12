"""A timeline of a run's processes during some global steps, for ui.perfetto.dev or chrome://tracing.

Every process records its own spans into a file of `run_dir/trace/<incarnation>/`; `write_trace` lays them all on one
axis, the wall clock, as `run_dir/trace.json` (Chrome's Trace Event Format). Between machines the axis is as good as
their clocks agree. On a GPU a span is the host's: kernels may run on after it (debug.profile_steps shows those).
"""

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from minpro_megatron.files.replacement import replace_file
from minpro_megatron.monitor.watchdog import Watchdog

log = logging.getLogger(__name__)

FOLDER = "trace"
FILE_NAME = "trace.json"


class Span(NamedTuple):
    """What a process did from `start_ns` to `end_ns` of the wall clock, in nanoseconds since 1970."""

    process: str  # such as "trainer rank 0"
    track: str  # a line of the process in the picture
    parallel: bool  # spans of the track overlap without belonging to each other; else they nest
    name: str
    start_ns: int
    end_ns: int
    arguments: dict[str, Any]


class Tracer(Protocol):
    """What the trainer says of itself; `NoTracer` where nobody wants to know."""

    def step(self, step: int) -> None:
        """Global step `step` begins, and the one before it has ended."""
        ...

    def span(self, name: str) -> AbstractContextManager[None]:
        """Within: this process does `name`. Spans nest."""
        ...

    def close(self) -> None:
        """The last step has ended."""
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

    `step` says where these begin and end, and writes what has been recorded. One thread may use an object.
    """

    def __init__(
        self, run_dir: Path, incarnation: int, process: str, steps: range, *, of_step: str = "", merges: bool = False
    ) -> None:
        """`of_step` names a span around each step, such as "global step"; "": there is none. `merges`: this process
        also writes trace.json, one step after the last of `steps` and at its end."""
        self._run_dir = Path(run_dir)
        self._folder = self._run_dir / FOLDER / str(incarnation)
        self._process = process
        self._steps = steps
        self._of_step = of_step
        self._merges = merges
        self._offset_ns = 0  # of the wall clock to the clock that spans are measured with
        self._opened_ns: int | None = None
        self._closed_ns: int | None = None
        self._step: tuple[int, int] | None = None  # the one under way, and when it began
        self._spans: list[Span] = []

    @staticmethod
    def now() -> int:
        """Nanoseconds, of a clock that never goes back."""
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
            # by now every other process has ended the last of the steps, and has written what it recorded
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
        """Something that went on from `start` to `end` (as `now` gave them), in a process that this one watches."""
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
        """Writes what has been recorded. A full disk costs the trace, not the run."""
        if not self._spans:
            return
        lines = "".join(json.dumps(span) + "\n" for span in self._spans)
        self._spans.clear()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"{self._process.replace(' ', '-')}.jsonl").open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            log.warning("the trace lacks spans of %s: %s", self._process, error)

    def close(self) -> None:
        self._end_step()
        self.flush()
        if self._opened_ns is not None:
            write_trace(self._run_dir)


class TracedWatchdog(Watchdog):
    """A watchdog whose guarded parts are spans as well."""

    def __init__(self, path: Path, timeout_s: float, tracer: Tracer) -> None:
        super().__init__(path, timeout_s)
        self._tracer = tracer

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        with self._tracer.span(what), super().guard(what):
            yield


def write_trace(run_dir: Path) -> Path | None:
    """Writes `run_dir/trace.json` from what the processes of the newest traced incarnation have recorded so far; None
    if there is nothing, or it cannot be written."""
    folders = [path for path in (Path(run_dir) / FOLDER).glob("*") if path.name.isdecimal()]
    if not folders:
        return None
    newest = max(folders, key=lambda path: int(path.name))
    path = Path(run_dir) / FILE_NAME
    try:
        spans = [span for file in sorted(newest.glob("*.jsonl")) for span in _read_spans(file)]
        replace_file(path, json.dumps(chrome_trace(spans)) + "\n")
    except OSError as error:
        log.warning("%s is not written: %s", path, error)
        return None
    return path


def _read_spans(path: Path) -> Iterator[Span]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield Span(*json.loads(line))
        except (ValueError, TypeError):
            continue  # half a line, of a process that was killed or is just writing it


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """The spans in Chrome's Trace Event Format: a complete event (ph X) each, times in microseconds from the first.

    What overlaps on one thread of that format must nest, so spans of a parallel track are spread over as many threads
    as went on at once.
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
    """For each span of one track, ordered by start, the lowest lane in which it follows or, unless it is parallel,
    lies within what is there."""
    lanes: list[list[int]] = []  # the ends of what is open in each, innermost last
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
