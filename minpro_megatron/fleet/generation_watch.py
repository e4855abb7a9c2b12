"""Detects a server that answers but does not generate: SGLang's /model_info answers even while its scheduler hangs."""

import asyncio
import time
from collections.abc import Awaitable, Callable

# Silence counts only after more than one request without an answer: the collector itself may have been delayed.
MIN_SILENCES = 2


class GenerationWatch:
    """The time for which a server has generated nothing although it was asked to.

    Suspended while the trainer may have paused the server, which then does not generate.
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
        """Whether to ask the server now, `interval_s` after the last request or the last sign of life."""
        asked_at = max(self.probed_at, self._seen_at)
        return self.probe is None and not self._is_suspended and time.monotonic() - asked_at >= interval_s

    async def ask(self, generates: Callable[[], Awaitable[bool]]) -> bool | None:
        """The result of `generates`; None if the watch was suspended meanwhile, so that the result means nothing."""
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
        """Records that the server has generated something."""
        self.is_well = True
        self._seen_at, self._num_silences = time.monotonic(), 0

    def is_silent_for(self, limit_s: float) -> bool:
        """Whether more than one request had no result, and there was no sign of life for longer than `limit_s`."""
        return self._num_silences >= MIN_SILENCES and time.monotonic() - self._seen_at > limit_s
