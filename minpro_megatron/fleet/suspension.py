"""The pause in which a server gets no new groups after a failure."""

import time

# The pause after a failure. It doubles with each further failure until a group succeeds.
FIRST_SUSPENSION_S = 0.5
MAX_SUSPENSION_S = 60.0


class Suspension:
    """Of one server."""

    def __init__(self) -> None:
        self._num_failures = 0  # since the last success
        self._until = 0.0

    @property
    def is_active(self) -> bool:
        return time.monotonic() < self._until

    def begin(self) -> float:
        """Pauses new groups after a failure and returns the seconds. Simultaneous failures count once."""
        if (left_s := self._until - time.monotonic()) > 0:
            return left_s
        pause_s = min(MAX_SUSPENSION_S, FIRST_SUSPENSION_S * 2**self._num_failures)
        self._num_failures += 1
        self._until = time.monotonic() + pause_s
        return pause_s

    def succeeded(self) -> None:
        """The next failure counts as the first one."""
        self._num_failures = 0
