"""The status `servers` of a run: that no server has answered for a minute or more.

Only the collector can report it: serve may run on other nodes and be healthy while the collector reaches no server.
"""

import logging
import time
from pathlib import Path

from minpro_megatron.monitor.status import NO_SERVER, SERVERS, write_status

log = logging.getLogger(__name__)

REPORTED_AFTER_S = 60.0


class ServerStatus:
    """Call `tick` about once per second."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._last_seen = time.monotonic()
        self._stated = ""

    def tick(self, num_members: int) -> None:
        """Reports a change: each minute in which no server answers, and the end of such a time. `num_members` is the
        number of servers that answer now."""
        now = time.monotonic()
        if num_members:
            self._last_seen = now
            phase = (
                f"{num_members} server{'s' * (num_members > 1)} again"
                if self._stated.startswith(NO_SERVER)
                else self._stated
            )
        elif now - self._last_seen >= REPORTED_AFTER_S:
            minutes = int((now - self._last_seen) // 60)
            phase = f"{NO_SERVER} has answered for {minutes} min: nothing is sampled; see the log of serve"
        else:
            return
        if phase == self._stated:
            return
        self._stated = phase
        log.warning("%s", phase)
        try:
            write_status(self._run_dir, SERVERS, phase)
        except OSError as error:  # only the display reads it
            log.warning("the status cannot be written: %s", error)
