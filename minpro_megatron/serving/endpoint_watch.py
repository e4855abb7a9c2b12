"""How serve watches the files of run_dir/endpoints for each of its servers, every server.health_interval_s."""

import logging
import time

import msgspec

from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.endpoints import (
    address_is_stated,
    remove_server_address,
    restart_requested,
    write_server_address,
)
from minpro_megatron.serving.turn_files import Turn, confirm_turn, read_turn

log = logging.getLogger(__name__)


class RestartRequests:
    """Checks every server.health_interval_s whether the collector has requested a restart of a server."""

    def __init__(self, config: RunConfig, index: int, incarnation: int) -> None:
        self._config, self._index, self._incarnation = config, index, incarnation
        self._looked_at = time.monotonic()

    def look(self, start: int) -> str | None:
        """The reason for a restart, if one was requested for start `start` of the server."""
        now = time.monotonic()
        if now - self._looked_at < self._config.server.health_interval_s:
            return None
        self._looked_at = now
        try:
            return restart_requested(self._config.run_dir, self._index, start, self._incarnation)
        except OSError as error:  # a network file system may fail briefly
            log.warning("restart requests for server %d cannot be read: %s", self._index, error)
            return None


class TurnWatch:
    """Checks several times per second, if trainer and servers share their GPUs, whether a server may have a process."""

    def __init__(self, config: RunConfig, index: int, incarnation: int) -> None:
        self._run_dir, self._index, self._incarnation = config.run_dir, index, incarnation
        self._is_needed = config.server.takes_turns
        self._turn = Turn(number=0, released=None)
        self._confirmed = 0

    @property
    def is_servers_turn(self) -> bool:
        return self._turn.released is None

    @property
    def is_last(self) -> bool:
        """Whether the servers have no more work in this run."""
        return self._turn.is_last

    def allows(self, start: int) -> bool:
        """Whether start `start` of the server may have a process."""
        if self._is_needed:
            try:
                self._turn = read_turn(self._run_dir, self._incarnation)
            except (OSError, msgspec.DecodeError) as error:  # a network file system may fail briefly
                log.warning("whose turn it is cannot be read for server %d: %s", self._index, error)
        return self._turn.allows(self._index, start)

    def confirm(self) -> None:
        """States that the turn holds for the server, unless it has been stated."""
        number = self._turn.number
        if number == self._confirmed:
            return
        try:
            confirm_turn(self._run_dir, self._index, number, self._incarnation)
        except OSError as error:
            log.warning("server %d: it cannot be stated that turn %d holds: %s", self._index, number, error)
        else:
            self._confirmed = number


class StatedAddress:
    """One server's address in the run folder. Checks every server.health_interval_s whether it is still there."""

    def __init__(self, config: RunConfig, incarnation: int) -> None:
        self._run_dir, self._incarnation = config.run_dir, incarnation
        self._interval_s = config.server.health_interval_s
        self._address: ServerAddress | None = None
        self._looked_at = 0.0

    def make(self, address: ServerAddress) -> None:
        write_server_address(self._run_dir, address, self._incarnation)
        self._address, self._looked_at = address, time.monotonic()

    def withdraw(self, index: int) -> None:
        remove_server_address(self._run_dir, index, self._incarnation)
        self._address = None

    def keep(self) -> None:
        """Writes the address again if its file is missing, because without it the server gets no work."""
        address, now = self._address, time.monotonic()
        if address is None or now - self._looked_at < self._interval_s:
            return
        self._looked_at = now
        if address_is_stated(self._run_dir, address.index, self._incarnation):
            return
        try:
            write_server_address(self._run_dir, address, self._incarnation)
        except OSError as error:
            if not self._run_dir.is_dir():  # the run has ended, not the server
                raise
            log.warning("the address of server %d is missing and cannot be written again: %s", address.index, error)
        else:
            log.warning("the address of server %d was missing from the run folder: written again", address.index)
