"""How fast a server generates one response."""

import time
from collections.abc import Sequence

# The rate is an average over about this number of groups. An average of this age is no longer used.
RATE_GROUPS = 8
RATE_LIFETIME_S = 300.0


class ResponseRate:
    """Of one server, measured over the groups that it has answered."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._num_groups = 0
        self._measured_at = 0.0

    def add(self, lengths: Sequence[int], wall_time_s: float) -> None:
        """Counts a group with responses of these numbers of tokens, all of them requested at once."""
        rate = max(lengths) / max(wall_time_s, 1e-6)  # the longest response was running for the whole time
        self._num_groups += 1
        weight = 1 / min(self._num_groups, RATE_GROUPS)
        self._rate += weight * (rate - self._rate)
        self._measured_at = time.monotonic()

    @property
    def tokens_per_s(self) -> float | None:
        """Of one response; None while there are too few groups, or if the last ones are too old."""
        known = self._num_groups >= RATE_GROUPS and time.monotonic() - self._measured_at < RATE_LIFETIME_S
        return self._rate if known else None
