"""Lets coroutines wait for changes of the collector's state."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from minpro_megatron.errors import ProjectError


class CollectorFailed(ProjectError):
    """The collector has failed; the message is the failure's."""


class StateChanges:
    """The changes of a state, counted, and its failure. Use it in one event loop."""

    def __init__(self) -> None:
        self.count = 0
        self.failure: str | None = None
        self._condition = asyncio.Condition()

    @asynccontextmanager
    async def making(self) -> AsyncIterator[None]:
        """Context manager: the state is changed inside; then all that wait are woken."""
        async with self._condition:
            yield
            self.count += 1
            self._condition.notify_all()

    async def after(self, seen: int) -> None:
        """Returns once there was a change after the `seen` first ones."""
        async with self._condition:
            await self._condition.wait_for(lambda: self.count != seen)

    async def next(self, timeout_s: float) -> None:
        """Waits for a change, at most `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s), self._condition:
                await self._condition.wait()
        except TimeoutError:
            return

    async def fail(self, message: str) -> None:
        """Reports the failure to all that wait, now and later."""
        async with self.making():
            self.failure = message

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise CollectorFailed(self.failure)
