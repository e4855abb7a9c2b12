"""The role `serve`: starts this machine's rollout servers, says where they are, watches them."""

import logging
import signal
import sys
import time
from contextlib import suppress

from minpro_megatron.config.run import RunConfig
from minpro_megatron.monitor.status import write_status
from minpro_megatron.serving.endpoints import remove_server_addresses, write_server_address
from minpro_megatron.serving.server_process import ServerProcess, ServerStartError, stop_servers

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2


class _StopRequest:
    """True once SIGTERM or SIGINT has come.

    A flag and short sleeps: an Event's lock could be held by the very code that the handler interrupts.
    """

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, *_: object) -> None:
        self._requested = True

    def __call__(self) -> bool:
        return self._requested


def run(config: RunConfig, incarnation: int) -> int:
    """Serves until SIGTERM (exit status 0) or until a server does not start or ends by itself (status 1)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s serve %(levelname)s %(message)s")
    stop_requested = _StopRequest()
    remove_server_addresses(config.run_dir)
    servers = [ServerProcess(config, index) for index in range(config.server.count)]
    try:
        return _serve(config, incarnation, servers, stop_requested)
    except (ServerStartError, ValueError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    finally:
        remove_server_addresses(config.run_dir)
        started = [server for server in servers if server.is_started]
        stop_servers(started)
        log.info("%d servers stopped", len(started))
        with suppress(OSError):
            write_status(config.run_dir, "serve", "stopped")


def _serve(config: RunConfig, incarnation: int, servers: list[ServerProcess], stop_requested: _StopRequest) -> int:
    start = time.monotonic()
    write_status(config.run_dir, "serve", f"starting {len(servers)} server{'s' * (len(servers) > 1)}")
    for server in servers:
        server.start()
    for server in servers:
        left_s = config.server.start_timeout_s - (time.monotonic() - start)
        if not server.wait_until_ready(left_s, stop_requested):
            return 0
        write_server_address(config.run_dir, server.address, incarnation)
        log.info("server %d ready at %s after %.1f s", server.index, server.address.url, time.monotonic() - start)
    write_status(config.run_dir, "serve", "serving")
    while not stop_requested():
        for server in servers:
            if server.exit_status is not None:
                print(f"serve: {server.describe_end()}", file=sys.stderr)
                return 1
        time.sleep(WATCH_INTERVAL_S)
    return 0
