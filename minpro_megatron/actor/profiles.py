"""Time measurements of a rank: its part of the run's trace, and torch.profiler's traces of chosen global steps."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function

from minpro_megatron.config.run import RunConfig
from minpro_megatron.monitor.trace import NoTracer, Recorder, Tracer

log = logging.getLogger(__name__)

FOLDER = "profiles"


def open_tracer(config: RunConfig, incarnation: int, rank: int, chunks: Sequence[Any], first_step: int) -> Tracer:
    """The tracer of rank `rank` that config.debug selects, with global step `first_step` started. `chunks` are the
    rank's Megatron modules; if the rank is traced, their schedules record spans too."""
    debug = config.debug
    tracer: Tracer = NoTracer()
    if debug.traced:
        process = f"trainer rank {rank}"
        tracer = Recorder(
            config.run_dir, incarnation, process, debug.traced, of_step="global step", merges=rank == 0
        )  # fmt: skip
    if debug.profiled and rank in debug.profile_ranks:
        steps = debug.profiled
        name = f"incarnation-{incarnation}-rank-{rank}-steps-{steps[0]}-{steps[-1]}.json.gz"
        tracer = Profiler(tracer, steps, config.run_dir / FOLDER / name)
    if not isinstance(tracer, NoTracer):
        for chunk in chunks:
            chunk.config.timers = MegatronTimers(tracer)
        tracer.step(first_step)
    return tracer


class Profiler:
    """A tracer that also runs torch.profiler during `steps` and writes its trace, gzipped, to `path`."""

    def __init__(self, tracer: Tracer, steps: range, path: Path) -> None:
        self._tracer = tracer
        self._steps = steps
        self._path = path
        self._profile: profile | None = None
        with profile():  # the first profile takes seconds to load, which should not be part of a step
            pass

    def step(self, step: int) -> None:
        self._tracer.step(step)
        if step not in self._steps:
            self._end()
        elif self._profile is None:
            self._profile = profile()  # of the CPU, and of the GPU if there is one
            self._profile.start()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        with self._tracer.span(name), record_function(name):
            yield

    def close(self) -> None:
        self._end()
        self._tracer.close()

    def _end(self) -> None:
        if self._profile is None:
            return
        with self._tracer.span("writing the profile"):  # takes seconds; the other ranks wait
            self._profile.stop()
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._profile.export_chrome_trace(str(self._path))
            except (OSError, RuntimeError) as error:
                log.warning("%s is not written: %s", self._path, error)
        self._profile = None


class MegatronTimers:
    """Replaces megatron.core.timers.Timers: what Megatron's schedules time (each micro-batch's forward and backward,
    the waits between pipeline stages, the reduction of gradients) becomes spans. There are no barriers: they would
    change the times."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        if name not in self._timers:
            self._timers[name] = _Timer(name, self._tracer)
        return self._timers[name]


class _Timer:
    def __init__(self, name: str, tracer: Tracer) -> None:
        self._name = name
        self._tracer = tracer
        self._span: AbstractContextManager[None] | None = None

    def start(self, barrier: bool = False) -> None:
        self._span = self._tracer.span(self._name)
        self._span.__enter__()

    def stop(self, barrier: bool = False) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
        self._span = None
