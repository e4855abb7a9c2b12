"""The time in which a server has no work."""

import time


class IdleTime:
    """Of one server, which is idle at first."""

    def __init__(self) -> None:
        self._since: float | None = time.monotonic()
        self._past_s = 0.0

    def end(self) -> None:
        """The server has work from now on."""
        self._past_s = self.total_s()
        self._since = None

    def begin(self) -> None:
        """The server has no work from now on."""
        self._since = time.monotonic()

    def total_s(self) -> float:
        """In seconds, including the time since the last beginning."""
        return self._past_s + (0.0 if self._since is None else time.monotonic() - self._since)
