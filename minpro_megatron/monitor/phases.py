"""How long a process spends in each of its phases: one context manager for the clock, the trace and the watchdog."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from minpro_megatron.monitor.trace import NoTracer, Tracer
from minpro_megatron.monitor.watchdog import Watchdog


class Lap(NamedTuple):
    """Seconds since the lap before: of each phase, and in all."""

    phases: dict[str, float]
    total: float


class PhaseClock:
    """Phases do not nest. Without a watchdog nothing is guarded."""

    def __init__(self, phases: Sequence[str], tracer: Tracer | None = None, watchdog: Watchdog | None = None) -> None:
        self.seconds = dict.fromkeys(phases, 0.0)  # of each phase since the start
        self._tracer = tracer or NoTracer()
        self._watchdog = watchdog
        self._lap_start, self._before = time.monotonic(), dict(self.seconds)

    @contextmanager
    def phase(self, name: str, guarded: str = "") -> Iterator[None]:
        """Within: the process is in phase `name`. `guarded` says what it does there, if that may take no longer than
        the watchdog's time limit."""
        start = time.monotonic()
        with self._tracer.span(name), self.guard(guarded) if guarded else nullcontext():
            yield
        self.seconds[name] += time.monotonic() - start

    def guard(self, what: str) -> AbstractContextManager[None]:
        """Within: `what` may take the watchdog's time limit, and no longer."""
        return self._watchdog.guard(what) if self._watchdog else nullcontext()

    def lap(self) -> Lap:
        """The seconds since the last call, which belong to one global step."""
        start, before = self._lap_start, self._before
        self._lap_start, self._before = time.monotonic(), dict(self.seconds)
        return Lap({name: now - before[name] for name, now in self.seconds.items()}, self._lap_start - start)
