"""Unauthenticated connections to the collector, which have not sent the run's token: limits on their age and number.

Every connection is an open file, and a program that connects and sends nothing would keep it open forever.
"""

import asyncio
import time
from collections.abc import Iterable

from aiohttp import web

# For the head of the first request. The trainer sends it at once.
TOKEN_TIMEOUT_S = 10.0
# The trainer has one connection at a time, and sends the token before it could be among the oldest.
MAX_PER_PEER = 32
SWEEP_INTERVAL_S = 0.25


class UnauthenticatedConnections:
    """Closes connections of `server` that have not sent the token in time, and the oldest ones of a peer that has too
    many. Run `sweep` as a task, and call `has_token` for each connection that has sent the token."""

    def __init__(self, server: web.Server) -> None:
        self._server = server
        self._known: set[web.RequestHandler] = set()
        self._seen_at: dict[web.RequestHandler, float] = {}

    def has_token(self, connection: web.RequestHandler) -> None:
        self._known.add(connection)

    async def sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            self._close_some()

    def _close_some(self) -> None:
        now, connections = time.monotonic(), self._server.connections
        self._known.intersection_update(connections)
        strangers = [one for one in connections if one not in self._known and one.transport is not None]
        self._seen_at = {one: self._seen_at.get(one, now) for one in strangers}
        of_peers: dict[str, list[web.RequestHandler]] = {}
        for one in strangers:
            assert one.transport is not None
            peer = one.transport.get_extra_info("peername")
            of_peers.setdefault(str(peer[0]) if peer else "", []).append(one)
        for of_peer in of_peers.values():
            of_peer.sort(key=lambda one: self._seen_at[one])
            _abort(of_peer[: max(0, len(of_peer) - MAX_PER_PEER)])
        _abort(one for one in strangers if now - self._seen_at[one] > TOKEN_TIMEOUT_S)


def _abort(connections: Iterable[web.RequestHandler]) -> None:
    for connection in connections:
        if connection.transport is not None:
            connection.transport.abort()
