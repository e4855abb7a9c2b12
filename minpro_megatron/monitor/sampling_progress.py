"""The display of an evaluation: responses per benchmark, their rate, and the time left."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from minpro_megatron.monitor.progress import duration

_LINE_EVERY_S = 30.0  # without a terminal


class SamplingProgress:
    """Bars on a terminal, otherwise a line every 30 seconds. Use as a context manager."""

    def __init__(self, done: Mapping[str, int], wanted: Mapping[str, int], console: Console | None = None) -> None:
        """`done` and `wanted`: responses by benchmark; responses that exist already do not count for the rate."""
        self._console = console or Console(highlight=False)
        self._wanted = sum(wanted.values())
        self._done = self._done_before = sum(done.values())
        self._tokens = 0
        self._phase = ""
        self._started = self._line_at = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {
            name: self._bars.add_task(name, total=wanted[name], completed=done.get(name, 0), rate="") for name in wanted
        }
        self._all = self._bars.add_task("all", total=self._wanted, completed=self._done, rate="")

    def __enter__(self) -> "SamplingProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def wait(self, phase: str) -> None:
        """Shows `phase`, for which sampling waits: beside the bar, or as a line if it is a new one or 30 seconds have
        passed."""
        self._bars.update(self._all, rate=phase)
        now = time.monotonic()
        if not self._console.is_terminal and (phase != self._phase or now - self._line_at >= _LINE_EVERY_S):
            self._phase, self._line_at = phase, now
            line = f"[{duration(now - self._started):>11}] {phase}"
            self._console.print(line, soft_wrap=True, markup=False)

    def start_clock(self) -> None:
        """Starts the clock of the rate, when the servers are ready."""
        self._started = self._line_at = time.monotonic()

    def add(self, benchmark: str, num_responses: int, num_tokens: int) -> None:
        """Adds `num_responses` responses with `num_tokens` tokens in total."""
        self._done += num_responses
        self._tokens += num_tokens
        self._bars.advance(self._tasks[benchmark], num_responses)
        self._bars.update(self._all, completed=self._done, rate=self.rate())
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._line_at >= _LINE_EVERY_S or self._done == self._wanted):
            self._line_at = now
            line = f"[{duration(now - self._started):>11}] {self._done}/{self._wanted} responses  {self.rate()}"
            self._console.print(line.rstrip(), soft_wrap=True, markup=False)

    def rate(self) -> str:
        """Tokens per second since the servers were ready, and the time left at the rate of responses, as text."""
        elapsed_s = max(time.monotonic() - self._started, 1e-6)
        left_s = elapsed_s / max(self._done - self._done_before, 1) * (self._wanted - self._done)
        left = f"  {duration(left_s)} left" if self._done < self._wanted else ""
        return f"{self._tokens / elapsed_s:,.0f} tokens/s{left}"
