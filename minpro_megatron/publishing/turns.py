"""The trainer's side of GPUs that it shares with the servers: their memory is released, used, and given back.

ServerTurns.begin     before the model is loaded: the servers first do the work of the version that they hold
ServerTurns.release   when they have done all work of a version; afterwards the memory is the trainer's
Publisher.publish     they take the memory for their weights back, receive the weights, and then that for their cache
ServerTurns.returned  from now on it is the servers' turn
"""

import logging

import msgspec

from minpro_megatron.config.run import RunConfig
from minpro_megatron.feed.answers import Send, release_for
from minpro_megatron.feed.batch_source import BatchSource
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.publishing.held_weights import HeldWeights, held_weights
from minpro_megatron.publishing.sender import PublishError
from minpro_megatron.records import PublishLease, ServerAddress
from minpro_megatron.serving.api_key import authorization
from minpro_megatron.serving.control import ServerControl
from minpro_megatron.serving.handover import start_releasing

log = logging.getLogger(__name__)


class ServerTurns:
    """Whose turn it is. Every method is collective; only rank 0 has a feed and sends requests to servers."""

    def __init__(self, config: RunConfig, mesh: Mesh, feed: BatchSource | None) -> None:
        self._mesh, self._feed = mesh, feed
        self._timeout_s = config.publish.timeout_s
        self._headers = authorization(config) if mesh.rank == 0 else {}
        self._servers: list[ServerAddress] = []  # on rank 0: those that have released their memory
        self.is_trainers = False
        self.lease: PublishLease | None = None  # of the last release
        self.initial: HeldWeights | None = None  # on rank 0: what the servers held before they first released it

    def begin(self, version: int) -> None:
        """Waits until the servers have done all work of `version`, with which the run starts, and takes the memory."""
        if self._feed:
            self._feed.start(version)
        self.release(self.await_release(version, _refuse))

    def await_release(self, version: int, send: Send) -> PublishLease:
        """The lease under which the servers may release their memory, after all work of `version`. Leases for servers
        that have lost `version` are fulfilled by `send` before it."""
        return release_for(
            lambda: self._mesh.from_rank_0(self._feed.release_begin(version) if self._feed else None), send
        )

    def release(self, lease: PublishLease) -> None:
        """Has the lease's servers release their memory. A server that cannot is ended, and restarted in its turn."""
        if self._feed:
            controls = self._controls(lease.servers)
            if self.initial is None:
                self.initial = held_weights(controls)
            calls = start_releasing(controls)
            released = calls.results()
            for line in calls.failures().values():
                log.warning(
                    "version %d: a server does not release its memory, and is restarted: %s", lease.version, line
                )
            self._servers = [server for server in lease.servers if server.index in released]
            self._feed.released(lease.version, sorted(released))
        self._mesh.from_rank_0(None)  # no rank uses memory before the servers have released it
        self.is_trainers, self.lease = True, lease

    def within_reach(self, lease: PublishLease) -> PublishLease:
        """The lease without the servers that did not release their memory: they have no process any more."""
        return msgspec.structs.replace(lease, servers=[server for server in lease.servers if server in self._servers])

    def await_all_ranks(self) -> None:
        """Returns once every rank has called it: each has then freed what it frees before, and a server may use it."""
        self._mesh.from_all_ranks(None)

    def returned(self) -> None:
        """Notes that the trainer's memory is free, once it is free on every rank."""
        self.await_all_ranks()
        self.is_trainers = False

    def ended(self) -> None:
        """Notes that no server has a process any more."""
        self.is_trainers = True

    def _controls(self, servers: list[ServerAddress]) -> list[ServerControl]:
        return [ServerControl(server, self._timeout_s, headers=self._headers) for server in servers]


def _refuse(lease: PublishLease) -> None:
    raise PublishError(
        f"all servers have lost version {lease.version} before the trainer has loaded its weights; start the run again"
    )
