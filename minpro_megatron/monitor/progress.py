"""The launcher's display: the phases of the roles before the first step, then the progress of training.

It only reads `metrics.jsonl`, `alarms.jsonl` and `status/`, so it can display any run, and no role waits for it.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minpro_megatron.config.run import RunConfig
from minpro_megatron.monitor.alarm_log import FILE_NAME as ALARMS_FILE
from minpro_megatron.monitor.alarm_log import decode_alarm
from minpro_megatron.monitor.alarms import Alarm
from minpro_megatron.monitor.history import Entry, HistoryTail, LineTail
from minpro_megatron.monitor.status import NO_SERVER, SERVERS, Status, read_statuses
from minpro_megatron.terminal_text import visible

_RECENT_STEPS = 10  # number of steps over which the time per step is averaged
_LINE_EVERY_STEPS = 10  # without a terminal
_REFRESH_S = 0.5
_SHOWN_ALARMS = 3  # the last ones, on a terminal
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class TrainingState:
    """The state of training according to the entries of metrics.jsonl so far."""

    num_global_steps: int
    steps_done: int = 0
    steps_before: int = 0  # that earlier starts of the run had trained
    latest: Mapping[str, float] = field(default_factory=dict)  # of the last trained step
    rewards: list[float] = field(default_factory=list)  # mean reward of each step
    evaluations: dict[int, float] = field(default_factory=dict)  # policy version -> pass@1
    _step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _last_time: float | None = None

    def add(self, entry: Entry) -> None:
        if "eval/pass_at_1" in entry.metrics:
            self.evaluations[entry.step] = entry.metrics["eval/pass_at_1"]
        if not entry.is_global_step:
            return
        self.steps_done = entry.step + 1
        self.latest = entry.metrics
        del self.rewards[entry.step :]  # of steps that are trained again after a resume
        self.rewards.append(self._latest("reward/mean"))
        seconds = entry.metrics.get("time/step_s", math.nan)
        if math.isnan(seconds) and self._last_time is not None:
            seconds = entry.time - self._last_time
        if not math.isnan(seconds):
            self._step_seconds.append(seconds)
        self._last_time = entry.time

    def resume(self) -> None:
        """What was added so far is of earlier starts: this start has trained no step yet."""
        self.steps_before, self.steps_done, self.latest = self.steps_done, 0, {}
        self._step_seconds.clear()
        self._last_time = None

    @property
    def waiting(self) -> str:
        """What a resumed run waits for, until its first step; else empty."""
        if self.steps_done or not self.steps_before:
            return ""
        earlier = f"earlier starts trained {self.steps_before} global steps"
        return f"resuming: {earlier}; waiting for the first one of this start"

    def _latest(self, name: str) -> float:
        """The value of the last step; NaN if it has no such metric."""
        return self.latest.get(name, math.nan)

    @property
    def seconds_per_step(self) -> float:
        """Mean over the last steps; NaN before the first."""
        return sum(self._step_seconds) / len(self._step_seconds) if self._step_seconds else math.nan

    @property
    def seconds_left(self) -> float:
        return self.seconds_per_step * (self.num_global_steps - self.steps_done)

    @property
    def time_left(self) -> str:
        """The time left as text; empty before the first step and after the last."""
        return f"{duration(self.seconds_left)} left" if self.seconds_left > 0 else ""

    def figures(self) -> dict[str, str]:
        """The values of the display as text; unknown values are excluded."""
        figures = {"reward": _number(self._latest("reward/mean"), "{:.3f}")}
        figures["accuracy"] = _number(100 * self._latest("reward/accuracy"), "{:.1f} %")
        if self.evaluations:
            versions = sorted(self.evaluations)
            shown = [versions[0]] if len(versions) == 1 else [versions[0], versions[-1]]
            figures["pass@1"] = " -> ".join(f"{100 * self.evaluations[version]:.1f} %" for version in shown)
        figures["staleness"] = _number(self._latest("staleness/max"), "{:.0f}")
        figures["tokens/s"] = _number(self._latest("throughput/response_tokens_per_s"), "{:,.0f}")
        figures["s/step"] = _number(self.seconds_per_step, "{:.1f}")
        return {name: text for name, text in figures.items() if text}


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def duration(seconds: float) -> str:
    """A duration in seconds as readable text.

    >>> duration(42), duration(192), duration(7380)
    ('42 s', '3 min 12 s', '2 h 03 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sparkline(values: list[float], width: int) -> str:
    """The values as a row of at most `width` bars, each the mean of its share of them; NaN is skipped."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    columns = min(width, len(finite))
    means = []
    for column in range(columns):
        part = finite[column * len(finite) // columns : (column + 1) * len(finite) // columns]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[min(int((value - low) / span * len(_BARS)), len(_BARS) - 1)] for value in means)


class Progress:
    """Shows a run's progress: a live panel on a terminal, otherwise a plain line about every ten steps.

    Call `tick` often; it reads the files about twice a second. Use as a context manager.
    """

    def __init__(self, config: RunConfig, roles: Sequence[str], console: Console | None = None) -> None:
        self._run_dir: Path = config.run_dir
        self._roles = roles
        self._title = f"{config.name} · {config.objective.name}"
        self._state = TrainingState(config.num_global_steps)
        self._tail = HistoryTail(config.run_dir)
        for entry in self._tail.new_entries():
            self._state.add(entry)
        self._state.resume()
        self._alarm_tail = LineTail(config.run_dir / ALARMS_FILE)
        self._alarms: list[Alarm] = []  # of this start
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._started = time.time()
        self._next_refresh = 0.0
        self._printed_steps = 0
        self._printed_waiting = False
        self._printed_alarms = 0
        self._printed_phases: dict[str, str] = {}

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            # No refresh thread: the launcher forks, and its children must not inherit a lock that such a thread holds.
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._next_refresh != math.inf:
            self._next_refresh = 0.0
            self.tick()
        self._stop_live()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def tick(self) -> None:
        """Updates the display. If it fails, it prints one warning and stops, so that the run continues."""
        if time.monotonic() < self._next_refresh:
            return
        self._next_refresh = time.monotonic() + _REFRESH_S
        try:
            self._refresh()
        except Exception as error:
            self._next_refresh = math.inf
            self._stop_live()
            print(f"warning: the progress display stopped: {type(error).__name__}: {error}", file=sys.stderr)

    def _refresh(self) -> None:
        for entry in self._tail.new_entries():
            self._state.add(entry)
        found = filter(None, map(decode_alarm, self._alarm_tail.new_lines()))
        self._alarms += [alarm for alarm, raised_at in found if raised_at >= self._started]
        statuses = read_statuses(self._run_dir)
        if self._live is not None:
            self._live.update(self._panel(statuses), refresh=True)
        else:
            self._print_news(statuses)

    @property
    def _is_training(self) -> bool:
        return 0 < self._state.steps_done < self._state.num_global_steps

    def _panel(self, statuses: Mapping[str, Status]) -> RenderableType:
        parts: list[RenderableType] = []
        state = self._state
        if state.steps_done:
            bar = Table.grid(padding=(0, 1), expand=True)
            bar.add_column(no_wrap=True)
            bar.add_column(ratio=1)
            bar.add_column(no_wrap=True)
            counted = f"step {state.steps_done}/{state.num_global_steps}"
            done = ProgressBar(total=state.num_global_steps, completed=state.steps_done)
            bar.add_row(counted, done, state.time_left)
            parts.append(bar)
            parts.append(_figures_line(state))
            trend = sparkline(state.rewards, _width(self._console) - len("reward ") - 4)  # inside the frame
            parts.append(Text(f"reward {trend}", style="cyan", no_wrap=True))
        if state.waiting:
            parts.append(_line(state.waiting))
        parts += [_line(f"alarm: {alarm}", style="yellow") for alarm in self._alarms[-_SHOWN_ALARMS:]]
        servers = statuses.get(SERVERS)
        if servers is not None and servers.phase.startswith(NO_SERVER):
            parts.append(_line(servers.phase, style="yellow"))
        if not self._is_training:  # during start and end, phases show what the run is doing
            parts.append(_phases_table(self._roles, statuses, self._started))
        elapsed = duration(time.time() - self._started)
        return Panel(
            Group(*parts),
            title=self._title,
            subtitle=elapsed,
            title_align="left",
            width=_width(self._console),
        )

    def _print_news(self, statuses: Mapping[str, Status]) -> None:
        state = self._state
        if state.waiting and not self._printed_waiting:
            self._printed_waiting = True
            self._print(state.waiting)
        for role, status in statuses.items():
            is_shown = not self._is_training or role == SERVERS
            if is_shown and self._printed_phases.get(role) != status.phase:
                self._printed_phases[role] = status.phase
                self._print(f"{role}: {status.phase}")
        for alarm in self._alarms[self._printed_alarms :]:
            self._print(f"alarm: {alarm}")
        self._printed_alarms = len(self._alarms)
        first = self._printed_steps == 0 and state.steps_done > 0
        last = state.steps_done == state.num_global_steps != self._printed_steps
        if first or last or state.steps_done >= self._printed_steps + _LINE_EVERY_STEPS:
            self._printed_steps = state.steps_done
            figures = "  ".join(f"{name} {text}" for name, text in state.figures().items())
            self._print(f"step {state.steps_done}/{state.num_global_steps}  {figures}  {state.time_left}".rstrip())

    def _print(self, line: str) -> None:
        elapsed = duration(time.time() - self._started)
        # soft_wrap: a log file has no width. markup off: a phase may contain brackets.
        self._console.print(f"[{elapsed:>11}] {visible(line)}", soft_wrap=True, markup=False, highlight=False)


def _line(text: str, style: str = "") -> Text:
    """Text of a role or an alarm, which may quote text from outside."""
    return Text(visible(text), style=style)


def _width(console: Console) -> int:
    return min(console.width, 100)


def _figures_line(state: TrainingState) -> Text:
    line = Text()
    for name, text in state.figures().items():
        text = text.replace(" ", "\u00a0")  # a narrow terminal breaks the line between values, not inside one
        line.append(f"{name}\u00a0", style="dim").append(text, style="bold").append("   ")
    return line


def _phases_table(roles: Sequence[str], statuses: Mapping[str, Status], started: float) -> Table:
    table = Table.grid(padding=(0, 2))
    for role in roles:
        status = statuses.get(role, Status("starting", started))
        table.add_row(
            Text(role, style="bold"),
            _line(status.phase),
            Text(duration(time.time() - status.time), style="dim"),
        )
    return table
