"""Does a server that answers also work? SGLang's /model_info answers while its scheduler hangs."""

import asyncio
import time
from collections.abc import Awaitable, Callable

# Silence counts only if a server was asked more than once: the collector itself may have been held up.
MIN_SILENCES = 2


class GenerationWatch:
    """For how long a server has generated nothing although it was asked.

    Suspended while the trainer may have it paused: then it rightly generates nothing.
    """

    def __init__(self) -> None:
        self.is_well = True
        self.probe: asyncio.Task[None] | None = None
        self.probed_at = -float("inf")
        self._is_suspended = False
        self._num_suspensions = 0
        self._seen_at = time.monotonic()
        self._num_silences = 0

    def suspend(self) -> None:
        self._is_suspended = True
        self._num_suspensions += 1

    def resume(self) -> None:
        if self._is_suspended:
            self._is_suspended = False
            self._seen_at, self._num_silences = time.monotonic(), 0

    def is_due(self, interval_s: float) -> bool:
        """Whether the server is to be asked, `interval_s` after the last question or sign of life."""
        asked_at = max(self.probed_at, self._seen_at)
        return self.probe is None and not self._is_suspended and time.monotonic() - asked_at >= interval_s

    async def ask(self, generates: Callable[[], Awaitable[bool]]) -> bool | None:
        """What `generates` says; None if the watch was suspended meanwhile, and the answer says nothing."""
        self.probed_at, suspensions = time.monotonic(), self._num_suspensions
        answer = await generates()
        if self._num_suspensions != suspensions:
            return None
        if answer:
            self.seen()
        else:
            self.is_well = False
            self._num_silences += 1
        return answer

    def seen(self) -> None:
        """The server has generated something."""
        self.is_well = True
        self._seen_at, self._num_silences = time.monotonic(), 0

    def is_silent_for(self, limit_s: float) -> bool:
        """Whether it was asked more than once in vain, and has shown no sign of life for longer than `limit_s`."""
        return self._num_silences >= MIN_SILENCES and time.monotonic() - self._seen_at > limit_s
