"""The progress of a replay as lines, for a file or a pipe; on a terminal it is a live display."""

from collections.abc import Callable

from minpro_megatron.monitor.progress import duration
from minpro_megatron.replay.job import ReplayProgress

NEWS_INTERVAL_S = 2.0  # between lines of different kinds of work
REPEAT_AFTER_S = 15.0  # between lines of the same kind, such as updates


class ProgressLines:
    """Calls `say` when another kind of work begins, at most every 2 s, and every 15 s while it lasts; with the rate so
    far and the time left, as soon as the ranks have gone through a mini-batch."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said, self._said_at = "", -NEWS_INTERVAL_S
        self._first: tuple[int, float] | None = None  # tokens and time when the passes over mini-batches began
        self._latest = (0, 0.0)  # tokens and time when they were counted

    def show(self, now: ReplayProgress, time_s: float) -> None:
        """`time_s`: of any monotonic clock. May be called at any rate."""
        if now.total is not None:
            self._first = self._first or (now.done, time_s)
            if now.done != self._latest[0]:
                self._latest = (now.done, time_s)
        kind = now.phase.partition("/")[0].rstrip("0123456789")  # of "update 3/16": "update "
        is_new = kind != self._said
        if time_s - self._said_at >= (NEWS_INTERVAL_S if is_new else REPEAT_AFTER_S):
            self._said, self._said_at = kind, time_s
            self._say(now.phase + self._counted(now, time_s))

    def _counted(self, now: ReplayProgress, time_s: float) -> str:
        if now.total is None or self._first is None:
            return ""
        text = f": {now.done:,} of {now.total:,} tokens"
        done, seconds = self._latest[0] - self._first[0], self._latest[1] - self._first[1]
        if done <= 0 or seconds <= 0:
            return text
        rate = done / seconds
        left = max(0.0, (now.total - now.done) / rate - (time_s - self._latest[1]))
        return f"{text}, {rate:,.0f}/s, {duration(left)} left"
