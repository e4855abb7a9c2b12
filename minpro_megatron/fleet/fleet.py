"""The rollout servers of a run: which ones answer, which hold the current weights, which one gets the next group.

Servers may appear and disappear: `serve` announces and withdraws their addresses, and each server is checked every few
seconds. A group waits until a server that holds the current version has capacity: without a limit, or for
`server.queue_timeout_s`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.errors import ProjectError
from minpro_megatron.fleet.dispatch import Dispatcher, Ticket
from minpro_megatron.fleet.member import Client, Key, Member, MemberGone, client_maker
from minpro_megatron.fleet.open_files import max_groups_under_way
from minpro_megatron.fleet.probes import ProbeEvents, Probes
from minpro_megatron.fleet.totals import FleetTotals
from minpro_megatron.fleet.turns import Turns
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.endpoints import num_servers, read_server_addresses, request_restart
from minpro_megatron.serving.errors import (
    InvalidAnswer,
    OutOfFiles,
    ServerError,
    ServerUnavailable,
    WrongPolicyVersion,
    named,
)

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.5
# The minimum time between two log lines that the process can open no more files.
OUT_OF_FILES_LOG_INTERVAL_S = 60.0
START_MARGIN_S = 60.0


def start_limit_s(server: ServerConfig) -> float:
    """How long to wait for all servers: longer than server.start_timeout_s, after which `serve` reports a server that
    does not start."""
    return server.start_timeout_s + START_MARGIN_S


class FleetError(ProjectError):
    """The run cannot continue with its servers; the message is one line with the reason."""


class Fleet:
    """The monitored servers of a run; use inside `async with`, in one event loop.

    `version` is the policy version that groups are sampled with. A server is *current* if it answers and holds that
    version: before the first `set_version` a server that reports version 0, afterwards only one that `set_version`
    lists. Raises ValueError if the API key is missing, or if routes are requested from a model without experts.
    """

    def __init__(
        self,
        config: RunConfig,
        facts: ModelFacts,
        incarnation: int,
        make_client: Callable[[ServerAddress], Client] | None = None,
        watch_interval_s: float = WATCH_INTERVAL_S,
    ) -> None:
        self._watch_interval_s = watch_interval_s
        self._server = config.server
        self._run_dir = config.run_dir
        self._incarnation = incarnation
        self._num_expected = num_servers(config.server)
        self._dispatcher = Dispatcher(
            self._current,
            self._is_current,
            config.server.max_requests_under_way,
            config.server.slow_factor,
            max_groups_under_way(config),
        )
        self._make_client = make_client or client_maker(config, facts)
        self._members: dict[Key, Member] = {}
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._failure: FleetError | None = None
        self._totals = FleetTotals()
        self._probes = Probes(
            config.server,
            self._members,
            watch_interval_s,
            ProbeEvents(self._notify, self._fail, self.count, self.out_of_files, self.request_restart),
        )
        self._turns = Turns(config.run_dir, incarnation, self._num_expected, watch_interval_s)
        self._out_of_files_at = -float("inf")
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def version(self) -> int:
        """The policy version that groups are sampled with."""
        return self._probes.version

    async def __aenter__(self) -> "Fleet":
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._watching is not None
        self._watching.cancel()
        await asyncio.wait({self._watching})
        for member in list(self._members.values()):
            self._remove(member)
        await asyncio.gather(*self._closing)

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Waits until all servers of the run answer. Raises FleetError if that takes more than `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                while len(self.members()) < self._num_expected:
                    self._raise_failure()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            setting = "server.urls" if self._server.urls else f"server.count = {self._server.count}"
            raise FleetError(
                f"{len(self.members())} of {self._num_expected} servers ({setting}) ready after {timeout_s:g} s; "
                "see the log of serve"
            ) from None
        self._raise_failure()

    def members(self) -> list[ServerAddress]:
        """The servers that answer, in order of index."""
        return [member.address for member in self._alive()]

    def missing(self) -> set[int]:
        """The indices of the run's servers that do not answer."""
        return set(range(self._num_expected)) - {member.address.index for member in self._alive()}

    def outdated(self) -> list[ServerAddress]:
        """The servers that answer but do not hold `version`: they get no work."""
        return [
            member.address
            for member in self._alive()
            if member.held_version != self.version and member.named_version != self.version
        ]

    def lend(self, servers: Sequence[ServerAddress]) -> None:
        """Lets the trainer change these servers' weights until `set_version` is called. Their answers meanwhile count
        only if they have the new version afterwards; requests that they return unfinished wait until then."""
        for address in servers:
            if member := self._members.get((address.index, address.start)):
                member.lend()

    def set_version(self, version: int, held_by: Sequence[int]) -> None:
        """From now on groups are sampled with `version`, which only the servers with the indices `held_by` hold.

        Each of them is checked once more before it gets work: it may have restarted since it received the weights.
        """
        if not self._probes.has_published:  # version 0: what the servers report does not count any more
            for member in self._members.values():
                member.held_version = None
        self._probes.set_version(version)
        for member in self._members.values():
            member.named_version = version if member.address.index in held_by else None
            member.take_back(with_the_weights=member.named_version is not None)
            member.probed_at = -float("inf")
        self._probes.start_due()
        if outdated := [address.index for address in self.outdated()]:
            log.warning("version %d: servers %s do not hold it and get no work", version, outdated)

    async def keep_only(self, released: Sequence[ServerAddress]) -> None:
        """Shared GPUs: returns once no server but these, which have released their memory, has a process."""
        await self._turns.keep_only(released)

    async def end_all(self) -> None:
        """Shared GPUs: returns once no server has a process; none is started again."""
        await self._turns.keep_only([], is_last=True)

    async def let_start(self) -> None:
        """Shared GPUs: servers that have ended may be started again."""
        await self._turns.let_start()

    def request_restart(self, servers: Sequence[ServerAddress], reason: str) -> None:
        """Asks `serve` to restart these servers; until then they get neither work nor weights."""
        for address in servers:
            member = self._members.get((address.index, address.start))
            if member is None or member.restart_requested:
                continue
            log.warning("%s is to be restarted: %s", member.name, reason)
            self.count("hung")
            member.restart_requested = True
            member.move_groups()
            try:
                request_restart(self._run_dir, address, self._incarnation, reason)
            except OSError as error:  # a network file system may fail briefly: requested again at the next failure
                log.warning("the restart of %s cannot be requested yet: %s", member.name, error)
                member.restart_requested = False

    def _alive(self) -> list[Member]:
        return sorted((m for m in self._members.values() if m.is_well), key=lambda m: m.key)

    def _current(self) -> list[Member]:
        return [member for member in self._alive() if member.held_version == self.version]

    def _is_current(self, member: Member) -> bool:
        return member.is_well and member.held_version == self.version and self._members.get(member.key) is member

    async def acquire(self, ticket: Ticket, num_requests: int, tried: Collection[Key] = ()) -> Member:
        """A current server with capacity for a group of `num_requests` requests; `release` it. See Dispatcher.acquire.

        Raises FleetError, also once a training group has waited for `server.queue_timeout_s`.
        """
        self._raise_failure()
        # evaluation groups wait behind all training groups, for as long as these take
        limit_s = None if ticket.is_evaluation else self._server.queue_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._dispatcher.acquire(ticket, num_requests, tried)
        except TimeoutError:
            raise FleetError(self._describe_full_queue()) from None

    async def until_current(self, member: Member) -> None:
        """Returns once a server that a group holds may get another request of it: not while the trainer may change its
        weights. Raises MemberGone if the server has left, or does not get the current weights."""
        while not self._is_current(member) or member.is_lent:
            is_here = self._members.get(member.key) is member and member.is_well
            if not is_here or self.version not in (member.held_version, member.named_version):
                raise MemberGone(f"{member.name} does not hold the current weights any more")
            await asyncio.sleep(self._watch_interval_s)

    def change_load(self, member: Member, num_requests: int) -> None:
        """See Dispatcher.change_load."""
        self._dispatcher.change_load(member, num_requests)

    def release(self, member: Member, num_requests: int) -> None:
        """Records that the group for which `acquire` returned this server has ended there."""
        self._dispatcher.release(member, num_requests)

    async def failed(self, member: Member, error: ServerError) -> bool:
        """Records a group's failure on a server. Returns True if the failure counts against the group.

        It does not if the server explains it: the server has gone, does not answer, or does not hold its version.
        """
        area = "invalid_answers" if isinstance(error, InvalidAnswer) else "failures"
        self.count(f"{area}/{error.kind}")
        member.suspension.begin()  # the next check after the suspension dispatches the waiting groups
        if isinstance(error, ServerUnavailable | WrongPolicyVersion):
            await self._probes.ask(member)
        is_current = member.answers and member.held_version == self.version
        return is_current and self._members.get(member.key) is member

    def out_of_files(self, error: OutOfFiles) -> None:
        """Records that this process can open no more connections, which is not a fault of the servers."""
        self.count("out_of_files")
        now = time.monotonic()
        if now - self._out_of_files_at > OUT_OF_FILES_LOG_INTERVAL_S:
            self._out_of_files_at = now
            log.error("no more files can be opened (ulimit -n), so some requests have to wait: %s", error)

    def count(self, name: str) -> None:
        """Adds one to the metric fleet/<name>."""
        self._totals.counts[name] += 1

    def metrics(self) -> dict[str, float]:
        """Totals since the start, and current rates; the names begin with fleet/."""
        alive = self._alive()
        return self._totals.metrics(
            {
                "members": len(alive),
                "current": len(self._current()),
                "outdated": len(self.outdated()),
                "slow": self._dispatcher.num_slow,
                "groups_in_flight": sum(member.num_groups for member in self._members.values()),
                "groups_waiting": self._dispatcher.num_waiting,
            },
            self._members.values(),
            alive,
        )

    def _describe_full_queue(self) -> str:
        current = self._current()
        under_way = sum(member.num_groups for member in current)
        return (
            f"a group has waited for server.queue_timeout_s = {self._server.queue_timeout_s:g} s for capacity at a "
            f"server that holds version {self.version}: {len(current)} of {self._num_expected} servers hold it, with "
            f"{under_way} groups in flight, and {self._dispatcher.num_waiting} more groups wait; see the logs of "
            "serve, and if the servers are healthy raise server.queue_timeout_s or start more servers"
        )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, ProjectError):
            log.error("monitoring the servers failed: unexpected error", exc_info=error)
        self._failure = FleetError(str(error) if isinstance(error, ServerError) else named(error))
        self._failure.__cause__ = error
        self._changed.set()
        self._dispatcher.fail(self._failure)

    def _notify(self, member: Member | None = None) -> None:
        """The state of `member`, or of any server, has changed: groups that wait may start."""
        self._changed.set()
        self._dispatcher.dispatch(member)

    async def _watch(self) -> None:
        try:
            while True:
                await self._look()
                await asyncio.sleep(self._watch_interval_s)
        except Exception as error:  # raised in all waiting calls, now or later
            self._fail(error)

    async def _look(self) -> None:
        try:
            addresses = await asyncio.to_thread(
                read_server_addresses, self._run_dir, self._num_expected, self._incarnation
            )
        except OSError as error:  # a network file system may fail briefly
            log.warning("the servers' addresses cannot be read: %s", error)
            return
        stated = {(address.index, address.start): address for address in addresses}
        for member in [member for key, member in self._members.items() if key not in stated]:
            self._remove(member)
        for key, address in stated.items():
            if key not in self._members:
                client = await self._make_client(address).__aenter__()
                self._members[key] = Member(address, client)
        self._probes.start_due()
        self._dispatcher.judge_rates()
        self._notify()

    def _remove(self, member: Member) -> None:
        """Removes a server whose address was withdrawn; its groups move to other servers."""
        del self._members[member.key]
        member.answers = False
        if member.num_groups:
            log.warning("%s is withdrawn; its %d groups move", member.name, member.num_groups)
        self._totals.removed(member)
        closing = asyncio.create_task(member.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
