"""The trainer's permissions to send weights to servers, one at a time: a new version, or to servers that lost it."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from minpro_megatron.evaluation.in_run import Evaluations
from minpro_megatron.records import PublishLease, ServerAddress

# A server that did not take the weights gets another chance after this long.
REPUBLISH_PAUSE_S = 15.0
MAX_UNASKED_S = 60.0


class Conflict(RuntimeError):
    """The trainer asked for something that the state of the run does not allow."""


class Servers(Protocol):
    """What is asked of the fleet; `minpro_megatron.fleet.fleet.Fleet` is one."""

    def members(self) -> list[ServerAddress]:
        """The servers that answer."""
        ...

    def outdated(self) -> list[ServerAddress]:
        """Those of them that do not hold the version of now, and so get no work."""
        ...

    def lend(self, servers: Sequence[ServerAddress]) -> None:
        """Until `set_version` the trainer may change the weights of these."""
        ...

    def set_version(self, version: int, held_by: Sequence[int]) -> None:
        """From now on `version` is the version of now; the servers of these indices hold it."""
        ...

    def request_restart(self, servers: Sequence[ServerAddress], reason: str) -> None:
        """These servers do no work and are to be started again."""
        ...

    def metrics(self) -> dict[str, float]: ...


class Leases:
    """Use in the collector's event loop. `current` is the lease that has not been ended yet."""

    def __init__(
        self,
        servers: Servers,
        canary_prompts: list[list[int]],
        evaluations: Evaluations,
        more_metrics: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """`more_metrics`: what a lease tells the trainer beside the metrics of servers and evaluations."""
        self._servers = servers
        self._more_metrics = more_metrics
        self._canary_prompts = canary_prompts
        self._evaluations = evaluations  # the trainer reports those that have ended
        self._not_before: dict[tuple[int, int], float] = {}  # by (index, start) of a server that failed
        self._idle_before = (0.0, 0.0)  # (time, idle seconds) when the last new version was granted
        self._asked_at = -math.inf  # of serverless_s
        self._serverless_since = 0.0
        self.current: PublishLease | None = None

    def can_grant(self) -> bool:
        return bool(self._servers.members())

    def grant(self, version: int, requests_in_flight: bool) -> None:
        """For `version`, new to the servers: all that answer."""
        self.current = self._make(version, self._servers.members(), requests_in_flight)
        self._idle_before = self._idle_now(self.current.metrics)

    def grant_again(self, version: int, requests_in_flight: bool) -> bool:
        """For `version`, which others hold already: the servers that lost it. False if there are none to try now."""
        if self.current is None:
            now = asyncio.get_running_loop().time()
            behind = [
                server
                for server in self._servers.outdated()
                if now >= self._not_before.get((server.index, server.start), 0.0)
            ]
            if not behind:
                return False
            self.current = self._make(version, behind, requests_in_flight)
        return self.current.version == version

    def serverless_s(self) -> float:
        """For how long no server has held the version of now, as far as it was asked at least once a minute."""
        now = asyncio.get_running_loop().time()
        asked_at, self._asked_at = self._asked_at, now
        if now - asked_at > MAX_UNASKED_S or len(self._servers.members()) > len(self._servers.outdated()):
            self._serverless_since = now
        return now - self._serverless_since

    def check_end(self, version: int) -> None:
        """Raises Conflict unless the lease under way is for `version`."""
        if self.current is None or version != self.current.version:
            raise Conflict(f"publish_end of version {version}: there is no lease for it")

    def end(self, held_by: Sequence[int], first_time: bool, late: Sequence[int] = ()) -> None:
        """The servers of these indices hold the lease's version. `first_time`: no others do. Those that were `late`
        with an answer to the trainer hang: they are started again, or the next publication would wait for them too."""
        assert self.current is not None, "check_end comes first"
        lease, self.current = self.current, None
        now = asyncio.get_running_loop().time()
        for server in lease.servers:
            if server.index not in held_by:
                self._not_before[server.index, server.start] = now + REPUBLISH_PAUSE_S
        if not first_time:
            behind = {server.index for server in self._servers.outdated()} - set(held_by)
            held_by = [server.index for server in self._servers.members() if server.index not in behind]
        self._servers.set_version(lease.version, held_by)
        hanging = [server for server in lease.servers if server.index in late and server.index not in held_by]
        self._servers.request_restart(hanging, f"late with an answer while version {lease.version} was published")

    def _make(self, version: int, servers: list[ServerAddress], requests_in_flight: bool) -> PublishLease:
        self._servers.lend(servers)
        return PublishLease(
            version=version,
            servers=servers,
            evaluations=list(self._evaluations.results),
            requests_in_flight=requests_in_flight,
            canary_prompts=self._canary_prompts,
            metrics={**self._metrics(), **self._more_metrics()},
        )

    def _metrics(self) -> dict[str, float]:
        """The fleet's and the evaluations', and the share of the servers' time that was idle since the last new version
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
