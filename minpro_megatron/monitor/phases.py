"""The time of a process in each of its phases: one context manager for clock, trace and watchdog."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from minpro_megatron.monitor.trace import NoTracer, Tracer
from minpro_megatron.monitor.watchdog import Watchdog


class Lap(NamedTuple):
    """Seconds since the previous lap: per phase, and in total."""

    phases: dict[str, float]
    total: float


class PhaseClock:
    """Measures phases, which must not nest. Without a watchdog phases have no time limit."""

    def __init__(self, phases: Sequence[str], tracer: Tracer | None = None, watchdog: Watchdog | None = None) -> None:
        self.seconds = dict.fromkeys(phases, 0.0)  # of each phase since the start
        self._tracer = tracer or NoTracer()
        self._watchdog = watchdog
        self._lap_start, self._before = time.monotonic(), dict(self.seconds)

    @contextmanager
    def phase(self, name: str, guarded: str = "") -> Iterator[None]:
        """Measures the block as phase `name`. `guarded` describes the block for the watchdog, whose time limit then
        applies to it."""
        start = time.monotonic()
        with self._tracer.span(name), self.guard(guarded) if guarded else nullcontext():
            yield
        self.seconds[name] += time.monotonic() - start

    def guard(self, what: str) -> AbstractContextManager[None]:
        """Applies the watchdog's time limit to the block; `what` describes it in the error."""
        return self._watchdog.guard(what) if self._watchdog else nullcontext()

    def lap(self) -> Lap:
        """The seconds since the last call: those of one global step."""
        start, before = self._lap_start, self._before
        self._lap_start, self._before = time.monotonic(), dict(self.seconds)
        return Lap({name: now - before[name] for name, now in self.seconds.items()}, self._lap_start - start)
