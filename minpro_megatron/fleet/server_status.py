"""The status `servers` of a run: that none has answered for a minute or more, which nobody else sees as it is.

serve may run on other nodes and be well itself: what the collector can reach decides.
"""

import logging
import time
from pathlib import Path

from minpro_megatron.monitor.status import NO_SERVER, SERVERS, write_status

log = logging.getLogger(__name__)

STATED_AFTER_S = 60.0


class ServerStatus:
    """Call `tick` about once a second."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._last_seen = time.monotonic()
        self._stated = ""

    def tick(self, num_members: int) -> None:
        """States a change: each minute in which none of the servers answers, and the end of that. `num_members`: how
        many answer now."""
        now = time.monotonic()
        if num_members:
            self._last_seen = now
            phase = (
                f"{num_members} server{'s' * (num_members > 1)} again"
                if self._stated.startswith(NO_SERVER)
                else self._stated
            )
        elif now - self._last_seen >= STATED_AFTER_S:
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
