"""The role `serve`: starts this machine's rollout servers, publishes their addresses, and restarts those that fail.

For external servers (server.urls) it only publishes the addresses while they respond.
"""

import logging
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import ProjectError, RunBlocked, report, report_unexpected
from minpro_megatron.monitor.memory import MemoryStatement
from minpro_megatron.monitor.status import write_status
from minpro_megatron.run_folder.start_fence import StartFence
from minpro_megatron.serving.addresses import is_loopback
from minpro_megatron.serving.api_key import has_key
from minpro_megatron.serving.endpoints import num_servers, remove_server_address
from minpro_megatron.serving.server_process import ServerProcess, ServerStartError, stop_servers
from minpro_megatron.serving.watched_server import ExternalServer, OwnServer, WatchedServer, external_urls

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2


class _StopRequest:
    """True once SIGTERM or SIGINT has arrived.

    It is a flag, polled with short sleeps, because the code that the handler interrupts could hold an Event's lock.
    """

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, *_: object) -> None:
        self._requested = True

    def __call__(self) -> bool:
        return self._requested


def run(config: RunConfig, incarnation: int, servers: range | None = None) -> int:
    """Serves until SIGTERM (exit status 0), until a first start fails or no server of the run is left (status 1), or
    until the run folder no longer belongs to this start (status 2).

    `servers`: the indices of this machine's servers; None: all servers."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s serve %(levelname)s %(message)s")
    stop_requested = _StopRequest()
    indices = range(num_servers(config.server)) if servers is None else servers
    # the name identifies the share of several
    _warn_of_open_servers(config)
    status = "serve" if len(indices) == num_servers(config.server) else f"serve-{indices.start}"
    _remove_addresses(config, indices, incarnation)
    fence, still_ours = StartFence(config.run_dir, incarnation), True
    processes: list[ServerProcess] = []
    try:
        watched: Sequence[WatchedServer]
        if config.server.urls:
            watched = _external_servers(config, incarnation)
        else:
            processes += [ServerProcess(config, index, index - indices.start) for index in indices]
            watched = [OwnServer(process, config, incarnation) for process in processes]
        with fence.explaining():
            _watch(config, status, watched, stop_requested, fence.look)
        return 0
    except RunBlocked as error:
        still_ours = False
        return report(error, "serve")
    except ProjectError as error:
        return report(error, "serve")
    except Exception:
        return report_unexpected("serve")
    finally:
        _remove_addresses(config, indices, incarnation)
        started = [process for process in processes if process.is_started]
        stop_servers(started)
        log.info("%d servers stopped", len(started))
        if still_ours:
            with suppress(OSError):
                write_status(config.run_dir, status, "stopped")


def _warn_of_open_servers(config: RunConfig) -> None:
    """Warns of servers without an API key: only a launcher creates one."""
    host = config.server.host
    if not config.server.urls and not is_loopback(host) and not config.server.api_key_variable and not has_key(config):
        log.warning(
            "server.host = %s: the servers have no API key, so anyone with access to their ports can use them and "
            "replace "
            "their weights; set server.api_key_variable, or start the run with launch or node, which create a key", host
        )  # fmt: skip


def _remove_addresses(config: RunConfig, indices: range, incarnation: int) -> None:
    for index in indices:
        remove_server_address(config.run_dir, index, incarnation)


def _external_servers(config: RunConfig, incarnation: int) -> list[ExternalServer]:
    return [ExternalServer(index, url, config, incarnation) for index, url in enumerate(external_urls(config.server))]


def _watch(
    config: RunConfig,
    status: str,
    servers: Sequence[WatchedServer],
    stop_requested: _StopRequest,
    look_at_start: Callable[[], None] = lambda: None,
) -> None:
    """Monitors the servers until a stop is requested. Raises ServerStartError if a server's first start fails, or if
    no server is left that could be restarted, and the errors of `look_at_start`."""
    shown, memory = "", MemoryStatement(config.run_dir, status)
    last_seen = last_complete = time.monotonic()
    while not stop_requested():
        look_at_start()
        for server in servers:
            server.tick()
        memory.tick()
        away = [server for server in servers if not server.address_is_stated]
        now = time.monotonic()
        last_seen = now if len(away) < len(servers) else last_seen
        last_complete = last_complete if away else now
        if config.server.urls and now - last_seen > config.server.start_timeout_s:
            raise ServerStartError(
                f"none of server.urls = {config.server.urls} has answered for server.start_timeout_s = "
                f"{config.server.start_timeout_s:g} s; start them, or correct their addresses"
            )
        given_up = [server.given_up for server in servers if server.given_up is not None]
        # With servers on other nodes the run continues; if these do not respond either, the collector ends it.
        if len(given_up) == num_servers(config.server):
            raise ServerStartError(given_up[0])
        phase = _phase(len(away), len(given_up), len(servers), config, now - last_complete)
        if phase != shown:
            write_status(config.run_dir, status, phase)
            log.info("%s", phase)
            shown = phase
        time.sleep(WATCH_INTERVAL_S)


def _phase(num_away: int, num_given_up: int, num_servers: int, config: RunConfig, waited_s: float) -> str:
    """The current phase of the role. While servers load it changes once per minute, so that display and log show it."""
    if not num_away:
        return "serving"
    verb = "waiting for" if config.server.urls else "starting"
    if num_away == num_given_up:
        return f"serving without {num_away} of {num_servers} server{'s' * (num_servers > 1)}"
    phase = f"{verb} {num_away} of {num_servers} server{'s' * (num_servers > 1)}"
    minutes = int(waited_s // 60)
    limit_s = config.server.start_timeout_s
    return f"{phase}, {minutes} min so far (server.start_timeout_s = {limit_s:g} s)" if minutes else phase
