"""The trainer's permissions to send weights to servers, one at a time: a new version, or one that servers have lost."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from minpro_megatron.collector.late_servers import LateServers
from minpro_megatron.evaluation.in_run import Evaluations
from minpro_megatron.records import PublishLease, ServerAddress

# A server that did not take the weights gets them offered again after this time.
REPUBLISH_PAUSE_S = 15.0
MAX_UNASKED_S = 60.0


class Conflict(RuntimeError):
    """The trainer requested something that the state of the run does not allow."""


class Servers(Protocol):
    """The methods of the fleet that leases use; implemented by `minpro_megatron.fleet.fleet.Fleet`."""

    def members(self) -> list[ServerAddress]:
        """The servers that answer."""
        ...

    def missing(self) -> set[int]:
        """The indices of the run's servers that do not answer."""
        ...

    def outdated(self) -> list[ServerAddress]:
        """The servers that answer but do not hold the current version, and so get no work."""
        ...

    def lend(self, servers: Sequence[ServerAddress]) -> None:
        """Lets the trainer change the weights of these servers until `set_version`."""
        ...

    def set_version(self, version: int, held_by: Sequence[int]) -> None:
        """Makes `version` the current version; the servers of these indices hold it."""
        ...

    def request_restart(self, servers: Sequence[ServerAddress], reason: str) -> None:
        """Stops giving work to these servers and requests their restart."""
        ...

    async def keep_only(self, released: Sequence[ServerAddress]) -> None:
        """Shared GPUs: returns once no server but these, which have released their memory, has a process."""
        ...

    async def end_all(self) -> None:
        """Shared GPUs: returns once no server has a process; none is started again."""
        ...

    async def let_start(self) -> None:
        """Shared GPUs: servers that have ended may be started again."""
        ...

    def metrics(self) -> dict[str, float]: ...


class Leases:
    """Use in the collector's event loop. `current` is the lease that has not ended yet."""

    def __init__(
        self,
        servers: Servers,
        canary_prompts: list[list[int]],
        evaluations: Evaluations,
        more_metrics: Callable[[], Mapping[str, float]] = dict,
        late_servers: LateServers | None = None,
    ) -> None:
        """`more_metrics`: metrics that a lease reports to the trainer besides those of servers and evaluations.
        `late_servers` is given if the servers share their GPUs with the trainer, in turns."""
        self._servers = servers
        self._late_servers = late_servers
        self._in_turns = late_servers is not None
        self._more_metrics = more_metrics
        self._canary_prompts = canary_prompts
        self._evaluations = evaluations  # the trainer reports those that have ended
        self._not_before: dict[tuple[int, int], float] = {}  # by (index, start) of a server that failed
        self._idle_before = (0.0, 0.0)  # (time, idle seconds) when the last new version was granted
        self._asked_at = -math.inf  # the last call of serverless_s
        self._serverless_since = 0.0
        self.current: PublishLease | None = None

    def can_grant(self) -> bool:
        return bool(self._servers.members())

    def may_turn_end(self) -> bool:
        """On shared GPUs, once all work of the servers' turn is done: whether no server is waited for that starts."""
        now = asyncio.get_running_loop().time()
        return self._late_servers is None or self._late_servers.may_turn_end(self._servers.missing(), now)

    def grant(self, version: int, requests_in_flight: bool, releases: bool = False) -> None:
        """Grants a lease of `version`, which is new to the servers, for all servers that answer. `releases`: their
        memory is the trainer's until the lease ends."""
        if self._late_servers is not None and releases:
            self._late_servers.turn_ends(self._servers.missing())
        self.current = self._make(version, self._servers.members(), requests_in_flight, releases)
        self._idle_before = self._idle_now(self.current.metrics)

    def grant_again(self, version: int, requests_in_flight: bool) -> bool:
        """Grants a lease of `version` for the servers that lost it. False if there are none to try now."""
        if self.current is None:
            now = asyncio.get_running_loop().time()
            behind = [
                server
                for server in self._servers.outdated()
                if now >= self._not_before.get((server.index, server.start), 0.0)
            ]
            # On shared GPUs they get the next version's weights, unless there is nobody left to sample for this one:
            # the trainer would need memory while other servers work.
            if not behind or (self._in_turns and len(behind) < len(self._servers.members())):
                return False
            self.current = self._make(version, behind, requests_in_flight)
        return self.current.version == version

    def serverless_s(self, version_is_published: bool) -> float:
        """The time for which no server has held the current version, or has answered if that version is not published
        yet: then the trainer may need long to load it. Correct if called at least once a minute."""
        now = asyncio.get_running_loop().time()
        asked_at, self._asked_at = self._asked_at, now
        useless = len(self._servers.outdated()) if version_is_published else 0
        if now - asked_at > MAX_UNASKED_S or len(self._servers.members()) > useless:
            self._serverless_since = now
        return now - self._serverless_since

    def released_already(self, version: int) -> PublishLease | None:
        """The current lease, if it is that of `version` and the servers have released their memory for it."""
        lease = self.current
        return lease if lease is not None and lease.releases and lease.version == version else None

    async def keep_only(self, version: int, released: Sequence[int]) -> None:
        """The servers of these indices have released their memory for the lease of `version`. Returns once all others
        are gone, so that the trainer may use the memory."""
        self.check_end(version)
        assert self.current is not None
        await self._servers.keep_only([server for server in self.current.servers if server.index in released])

    def check_end(self, version: int) -> None:
        """Raises Conflict unless the current lease is for `version`."""
        if self.current is None or version != self.current.version:
            raise Conflict(f"version {version}: there is no lease for it")

    async def end_servers(self) -> None:
        """On shared GPUs, when the servers have no more work: returns once the trainer may use all memory."""
        if self._in_turns:
            await self._servers.end_all()

    async def let_start(self) -> None:
        """On shared GPUs, before a lease ends: the trainer's memory is free again."""
        if self._in_turns:
            await self._servers.let_start()

    def end(self, held_by: Sequence[int], first_time: bool, late: Sequence[int] = ()) -> None:
        """Ends the lease: the servers of these indices hold its version. `first_time`: no other servers do. Servers
        that answered the trainer `late` hang: they are restarted, or the next publication would wait for them too."""
        assert self.current is not None, "check_end comes first"
        lease, self.current = self.current, None
        now = asyncio.get_running_loop().time()
        if self._late_servers is not None:
            self._late_servers.turn_begins(now)
        for server in lease.servers:
            if server.index not in held_by:
                self._not_before[server.index, server.start] = now + REPUBLISH_PAUSE_S
        if not first_time:
            behind = {server.index for server in self._servers.outdated()} - set(held_by)
            held_by = [server.index for server in self._servers.members() if server.index not in behind]
        self._servers.set_version(lease.version, held_by)
        hanging = [server for server in lease.servers if server.index in late and server.index not in held_by]
        self._servers.request_restart(hanging, f"late with an answer while version {lease.version} was published")

    def _make(
        self, version: int, servers: list[ServerAddress], requests_in_flight: bool, releases: bool = False
    ) -> PublishLease:
        self._servers.lend(servers)
        return PublishLease(
            version=version,
            servers=servers,
            releases=releases,
            evaluations=list(self._evaluations.results),
            requests_in_flight=requests_in_flight,
            canary_prompts=self._canary_prompts,
            metrics={**self._metrics(), **self._more_metrics()},
        )

    def _metrics(self) -> dict[str, float]:
        """Metrics of the fleet and the evaluations, and the idle share of the servers' time since the last new version
        was granted."""
        metrics = self._servers.metrics() | self._evaluations.metrics()
        asked_at, idle_before = self._idle_before
        now, idle_s = self._idle_now(metrics)
        available_s = (now - asked_at) * metrics.get("fleet/members", 0.0)
        if asked_at and available_s > 0:
            metrics["overlap/server_idle_share"] = min(1.0, (idle_s - idle_before) / available_s)
        return metrics

    def _idle_now(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        return asyncio.get_running_loop().time(), metrics.get("fleet/idle_s", 0.0)
