"""Servers that the end of the servers' turn waits for, on GPUs that they share with the trainer."""

import logging
import math
from collections.abc import Set

log = logging.getLogger(__name__)


class LateServers:
    """A server that is starting at the end of the servers' turn is stopped, and started again in the next turn: if
    turns are shorter than its start it would never join. Therefore a turn lasts until the servers have joined that the
    turn before it ended without, for at most `limit_s` seconds from its beginning. A server that needs longer is not
    waited for again until it has joined."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began_at = -math.inf
        self._missed: set[int] = set()  # at the end of the turn before
        self._given_up: set[int] = set()
        self._announced: set[int] = set()

    def turn_begins(self, now: float) -> None:
        self._began_at = now

    def may_turn_end(self, missing: Set[int], now: float) -> bool:
        """`missing`: the indices of the run's servers that do not answer."""
        awaited = missing & self._missed - self._given_up
        if awaited and now - self._began_at > self._limit_s:
            log.warning(
                "servers %s have not started within %g s: no turn waits for them", sorted(awaited), self._limit_s
            )
            self._given_up |= awaited
            return True
        if awaited - self._announced:
            self._announced |= awaited
            log.info("the servers' turn lasts until servers %s have started", sorted(awaited))
        return not awaited

    def turn_ends(self, missing: Set[int]) -> None:
        self._missed = set(missing)
        self._given_up &= missing
        self._announced.clear()
