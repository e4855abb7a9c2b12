"""Monitored servers: a started server is restarted when it ends or hangs; an external server is only monitored.

Call the `tick` of each a few times per second from the main thread: it does what is due and returns at once.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol
from urllib.parse import urlsplit

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.errors import UserError
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.api_key import authorization
from minpro_megatron.serving.endpoint_watch import RestartRequests, StatedAddress, TurnWatch
from minpro_megatron.serving.health import Health, Question, ask, ask_to_generate, overlaps_scheduling
from minpro_megatron.serving.server_command import needs_synchronous_scheduling
from minpro_megatron.serving.server_process import ServerProcess, ServerStartError, stop_servers

log = logging.getLogger(__name__)

# The pause before a restart. It doubles each time, so that a server that ends at once is not restarted continuously.
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
# Silence counts only after more than one check without an answer: this process itself may have been delayed.
MIN_SILENCES = 2


class WatchedServer(Protocol):
    """The common interface of OwnServer and ExternalServer."""

    address_is_stated: bool
    given_up: str | None  # why it is neither up nor being restarted at the moment

    def tick(self) -> None:
        """Does what is due. Raises ServerStartError if the server cannot be used at all."""
        ...


class _Silence:
    """Repeats a health check, and measures for how long there has been no answer."""

    def __init__(self, server: ServerConfig, call: Callable[[float], Health]) -> None:
        self._limit_s = server.unhealthy_after_s
        self._interval_s = min(server.health_interval_s, self._limit_s / 3)
        self._call = partial(call, self._interval_s)
        self._question: Question[Health] | None = None
        self._asked_at = self._answered_at = time.monotonic()
        self._num_silences = 0

    def look(self) -> Health | None:
        """The result of a check that has just ended; None if none has. Starts the next check when it is due."""
        now, health = time.monotonic(), None
        if self._question is not None and self._question.is_over():
            health = self._question.answer
            if health is Health.ANSWERS:
                self._answered_at, self._num_silences = self._question.asked_at, 0
            else:
                self._num_silences += 1
            self._question = None
        if now - self._asked_at >= self._interval_s:
            self._asked_at = now
            if self._question is None:
                self._question = Question(self._call)
            else:  # an answer may arrive endlessly in small pieces, and a thread cannot be ended
                self._num_silences += 1
        return health

    @property
    def is_too_long(self) -> bool:
        return self._num_silences >= MIN_SILENCES and time.monotonic() - self._answered_at > self._limit_s


class OwnServer:
    """A server of this machine: started, announced once it generates, and restarted when it ends or hangs.

    It is restarted at most server.max_restarts times within server.restart_window_s; then it stays down until one of
    these restarts is older than that. A server that was never ready is not restarted, because its problem is probably
    permanent.
    """

    def __init__(self, server: ServerProcess, config: RunConfig, incarnation: int) -> None:
        self.address_is_stated = False
        self.given_up: str | None = None
        self._server = server
        self._config = config
        self._headers = authorization(config)
        self._phase = self._start
        self._started_at = self._restart_at = 0.0
        self._readiness: Question[bool] | None = None
        self._silence = _Silence(config.server, self._ask)
        self._restart_requests = RestartRequests(config, server.index, incarnation)
        self._statement = StatedAddress(config, incarnation)
        self._turns = TurnWatch(config, server.index, incarnation)
        self._was_ready = False
        self._restarted_at: deque[float] = deque()  # within the last server.restart_window_s

    def tick(self) -> None:
        """Starts, announces, checks or restarts the server. Raises ServerStartError if its first start fails."""
        is_up = self._phase != self._start
        if not self._turns.allows(self._server.address.start if is_up else -1) and is_up:
            self._stop_for_the_trainer()
        self._turns.confirm()
        self._phase()

    def _stop_for_the_trainer(self) -> None:
        """The GPUs are the trainer's, and this server has not released its memory: it is starting, or has failed, or
        the run needs it no more."""
        if self.address_is_stated and not self._turns.is_last:
            self._failed(f"server {self._server.index} at {self._server.address.url} has not released its memory")
            return
        later = (
            "the run needs no server any more" if self._turns.is_last else "it is started again in the servers' turn"
        )
        log.info("server %d is stopped: %s", self._server.index, later)
        if self.address_is_stated:
            self._statement.withdraw(self._server.index)
            self.address_is_stated = False
        stop_servers([self._server])
        self._phase = self._start

    def _start(self) -> None:
        if time.monotonic() < self._restart_at or not self._turns.is_servers_turn:
            return
        self.given_up = None
        self._started_at, self._readiness = time.monotonic(), None
        try:
            self._server.start()
        except ServerStartError as error:
            self._failed(str(error))
        else:
            self._phase = self._wait_until_ready

    def _wait_until_ready(self) -> None:
        server, waited_s = self._server, time.monotonic() - self._started_at
        is_over = self._readiness is not None and self._readiness.is_over()
        if server.exit_status is not None:
            self._failed(server.describe_end())
        elif is_over and self._readiness is not None and self._readiness.answer:
            self._statement.make(server.address)
            self.address_is_stated = self._was_ready = True
            self._silence = _Silence(self._config.server, self._ask)
            self._phase = self._check
            log.info("server %d ready at %s after %.1f s", server.index, server.address.url, waited_s)
        elif waited_s > self._config.server.start_timeout_s:
            self._failed(server.describe_slow_start())
        elif self._readiness is None or is_over:
            self._readiness = Question(server.generates)

    def _check(self) -> None:
        self._silence.look()
        self._statement.keep()
        requested = self._restart_requests.look(self._server.address.start)
        if self._server.exit_status is not None:
            self._failed(self._server.describe_end())
        elif self._silence.is_too_long:
            self._failed(
                f"server {self._server.index} at {self._server.address.url}: no answer to /model_info for "
                f"server.unhealthy_after_s = {self._config.server.unhealthy_after_s:g} s; from "
                f"{self._server.log_file}:\n{self._server.log_tail()}"
            )
        elif requested is not None:
            self._failed(f"server {self._server.index} at {self._server.address.url}: {requested}")

    def _failed(self, why: str) -> None:
        # Withdrawn first: its groups move to other servers while it is being ended.
        self._statement.withdraw(self._server.index)
        self.address_is_stated = False
        if not self._was_ready:
            raise ServerStartError(why)
        self._phase = self._start
        self._plan_restart(why)
        if self._server.is_started:
            stop_servers([self._server])

    def _plan_restart(self, why: str) -> None:
        limit, window_s = self._config.server.max_restarts, self._config.server.restart_window_s
        now, recent = time.monotonic(), self._restarted_at
        while recent and now - recent[0] >= window_s:
            recent.popleft()
        if len(recent) < limit:
            pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** len(recent))
            recent.append(now)
            log.warning("restart %d of at most %d within %g s, in %g s: %s", len(recent), limit, window_s, pause_s, why)
            self._restart_at = now + pause_s
            return
        self.given_up = f"failed again after server.max_restarts = {limit} restarts within {window_s:g} s: {why}"
        self._restart_at = recent.popleft() + window_s if recent else float("inf")
        recent.append(self._restart_at)
        log.error(
            "no further restart of server %d for %g s: %s", self._server.index, self._restart_at - now, self.given_up
        )

    def _ask(self, timeout_s: float) -> Health:
        return ask(self._server.address.url, self._headers, timeout_s)


class ExternalServer:
    """An external server, announced while it answers. After an absence it counts as restarted."""

    given_up: str | None = None  # it may return at any time

    def __init__(self, index: int, url: str, config: RunConfig, incarnation: int) -> None:
        self.address_is_stated = False
        self.url = url
        self._index = index
        self._config = config
        self._num_absences = 0
        self._is_reported = False
        self._headers = authorization(config)
        self._ask_scheduling = partial(overlaps_scheduling, url, self._headers, config.server.health_interval_s)
        self._scheduling: Question[bool | None] | None = None
        self._hangs = False
        self._restart_requests = RestartRequests(config, index, incarnation)
        self._statement = StatedAddress(config, incarnation)
        self._silence = _Silence(config.server, self._ask)

    def tick(self) -> None:
        """Announces or withdraws its address. Raises ServerStartError if it refuses the API key, or uses overlap
        scheduling although the run cannot have that."""
        health = self._silence.look()
        self._statement.keep()
        requested = self._restart_requests.look(self._num_absences) if self.address_is_stated else None
        if health is Health.FORBIDDEN:
            variable = self._config.server.api_key_variable
            raise ServerStartError(
                f"server {self._index} at {self.url} refuses the API key (server.api_key_variable = {variable!r}); "
                "name the variable that holds its key"
            )
        if health is Health.ANSWERS and not self.address_is_stated:
            if needs_synchronous_scheduling(self._config) and not self._schedules_synchronously():
                return
            address = ServerAddress(
                index=self._index,
                url=self.url,
                tensor_parallel=self._config.server.tensor_parallel,
                start=self._num_absences,
            )
            self._statement.make(address)
            self.address_is_stated, self._hangs = True, False
            log.info("server %d answers at %s", self._index, self.url)
        elif not self.address_is_stated and health is not None and not self._is_reported:
            self._is_reported = True
            log.warning("server %d at %s does not answer yet: waiting for it", self._index, self.url)
        elif self.address_is_stated and (health is Health.GONE or self._silence.is_too_long):
            log.warning("server %d at %s no longer answers: no work for it until it does", self._index, self.url)
            self._withdraw()
        elif requested is not None:
            log.warning("server %d at %s: %s: no work for it until it generates", self._index, self.url, requested)
            self._hangs = True
            self._withdraw()

    def _withdraw(self) -> None:
        self._statement.withdraw(self._index)
        self.address_is_stated = False
        self._num_absences += 1
        self._silence = _Silence(self._config.server, self._ask)  # earlier answers do not count

    def _ask(self, timeout_s: float) -> Health:
        return (ask_to_generate if self._hangs else ask)(self.url, self._headers, timeout_s)

    def _schedules_synchronously(self) -> bool:
        """False until the server has reported it. Raises ServerStartError if it uses overlap scheduling."""
        if self._scheduling is None:
            self._scheduling = Question(self._ask_scheduling)
        if not self._scheduling.is_over():
            return False
        overlaps, self._scheduling = self._scheduling.answer, None
        if overlaps:
            raise ServerStartError(
                f"server {self._index} at {self.url} uses overlap scheduling: with staleness.mode = bounded and "
                "publish.pause_mode = in_place it would report the wrong version for tokens; start it with "
                "--disable-overlap-schedule, or set publish.pause_mode to abort or retract"
            )
        return overlaps is False


def external_urls(server: ServerConfig) -> list[str]:
    """server.urls without trailing slashes. Raises UserError for a URL that is not a server's, or that is repeated."""
    urls = [url.rstrip("/") for url in server.urls]
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query:
            raise UserError(f"server.urls: {url!r} must be like http://10.0.0.7:30000")
        if parts.username or parts.password:
            raise UserError("server.urls: a URL must not hold a password; use server.api_key_variable")
    if len(set(urls)) != len(urls):
        raise UserError(f"server.urls = {urls}: each server may be named once only")
    return urls
