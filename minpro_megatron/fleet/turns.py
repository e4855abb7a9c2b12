"""Tells serve whose turn it is on GPUs that trainer and servers share, and waits until that holds."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.turn_files import last_confirmed, write_turn

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0


class Turns:
    """The turns of one start of the run, whose `num_servers` servers serve has started."""

    def __init__(self, run_dir: Path, incarnation: int, num_servers: int, poll_s: float) -> None:
        self._run_dir, self._incarnation, self._num_servers = run_dir, incarnation, num_servers
        self._poll_s = poll_s
        self._number = 0

    async def keep_only(self, released: Sequence[ServerAddress], is_last: bool = False) -> None:
        """Returns once no server but these has a process: the trainer may use the memory. Until `let_start` serve
        starts none. `is_last`: the run needs no server any more. Raises OSError if the message cannot be written."""
        self._number += 1
        await asyncio.to_thread(write_turn, self._run_dir, self._number, released, self._incarnation, is_last)
        loop = asyncio.get_running_loop()
        told_at = loop.time()
        while missing := await asyncio.to_thread(self._not_confirmed):
            if loop.time() - told_at > LOG_INTERVAL_S:
                told_at = loop.time()
                log.warning("still waiting until servers %s are gone or have released their memory", missing)
            await asyncio.sleep(self._poll_s)

    async def let_start(self) -> None:
        """It is the servers' turn: those that have ended are started again."""
        self._number += 1
        await asyncio.to_thread(write_turn, self._run_dir, self._number, None, self._incarnation)

    def _not_confirmed(self) -> list[int]:
        def is_missing(index: int) -> bool:
            try:
                return last_confirmed(self._run_dir, index, self._incarnation) < self._number
            except (OSError, ValueError):  # a network file system may fail briefly
                return True

        return [index for index in range(self._num_servers) if is_missing(index)]
