"""The rollout servers of a run: which ones answer, which hold the current weights, which one gets the next group.

Servers may appear and disappear: `serve` announces and withdraws their addresses, and each server is checked every few
seconds. A group waits until a server that holds the current version has capacity: without a limit, or for
`server.queue_timeout_s`.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.errors import ProjectError
from minpro_megatron.fleet.dispatch import Dispatcher, Ticket
from minpro_megatron.fleet.member import Client, Key, Member, client_maker
from minpro_megatron.fleet.open_files import max_groups_under_way
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.endpoints import num_servers, read_server_addresses, request_restart
from minpro_megatron.serving.errors import (
    InvalidAnswer,
    OutOfFiles,
    RequestRefused,
    ServerError,
    ServerUnavailable,
    WrongPolicyVersion,
    named,
)

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.5
# An answer to /model_info needs no computation, but the server's process may be busy with a large answer.
MAX_PROBE_S = 30.0
# For one token. SGLang itself gives up after 20 s.
GENERATION_PROBE_S = 30.0
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
    version: a server that the run started holds version 0, and any other version only after `set_version` lists the
    server. Raises ValueError if the API key is missing, or if routes are requested from a model without experts.
    """

    def __init__(
        self,
        config: RunConfig,
        facts: ModelFacts,
        incarnation: int,
        make_client: Callable[[ServerAddress], Client] | None = None,
        watch_interval_s: float = WATCH_INTERVAL_S,
    ) -> None:
        self.version = 0
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
        self._publications = 0
        self._counts: Counter[str] = Counter()
        self._out_of_files_at = -float("inf")
        self._past_idle_s = 0.0
        self._tokens_of: Counter[int] = Counter()
        self._closing: set[asyncio.Task[None]] = set()

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
        self.version = version
        self._publications += 1
        for member in self._members.values():
            member.named_version = version if member.address.index in held_by else None
            member.take_back(with_the_weights=member.named_version is not None)
            member.probed_at = -float("inf")
        self._probe_members()
        if outdated := [address.index for address in self.outdated()]:
            log.warning("version %d: servers %s do not hold it and get no work", version, outdated)

    def request_restart(self, servers: Sequence[ServerAddress], reason: str) -> None:
        """Asks `serve` to restart these servers; until then they get neither work nor weights."""
        for address in servers:
            member = self._members.get((address.index, address.start))
            if member is None or member.restart_requested:
                continue
            log.warning("%s is to be restarted: %s", member.name, reason)
            self._counts["hung"] += 1
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

    def release(self, member: Member, num_requests: int) -> None:
        """Records that the group for which `acquire` returned this server has ended there."""
        self._dispatcher.release(member, num_requests)

    async def failed(self, member: Member, error: ServerError) -> bool:
        """Records a group's failure on a server. Returns True if the failure counts against the group.

        It does not if the server explains it: the server has gone, does not answer, or does not hold its version.
        """
        area = "invalid_answers" if isinstance(error, InvalidAnswer) else "failures"
        self._counts[f"{area}/{error.kind}"] += 1
        member.suspend()  # the next check after the suspension dispatches the waiting groups
        if isinstance(error, ServerUnavailable | WrongPolicyVersion):
            await self._ask(member)
        is_current = member.answers and member.held_version == self.version
        return is_current and self._members.get(member.key) is member

    def out_of_files(self, error: OutOfFiles) -> None:
        """Records that this process can open no more connections, which is not a fault of the servers."""
        self._counts["out_of_files"] += 1
        now = time.monotonic()
        if now - self._out_of_files_at > OUT_OF_FILES_LOG_INTERVAL_S:
            self._out_of_files_at = now
            log.error("no more files can be opened (ulimit -n), so some requests have to wait: %s", error)

    def count(self, name: str) -> None:
        """Adds one to the metric fleet/<name>."""
        self._counts[name] += 1

    def metrics(self) -> dict[str, float]:
        """Totals since the start, and current rates; the names begin with fleet/."""
        alive = self._alive()
        tokens = Counter(self._tokens_of)
        tokens.update({member.address.index: member.num_tokens for member in self._members.values()})
        idle_s = self._past_idle_s + sum(member.idle_s() for member in self._members.values())
        found = {
            "members": len(alive),
            "current": len(self._current()),
            "outdated": len(self.outdated()),
            "slow": self._dispatcher.num_slow,
            "groups_in_flight": sum(member.num_groups for member in self._members.values()),
            "groups_waiting": self._dispatcher.num_waiting,
            "idle_s": idle_s,
            **{
                name: self._counts[name]
                for name in ("groups", "retries", "moved_groups", "restarts", "hung", "out_of_files")
            },
            **self._counts,
            **{f"tokens/{index}": count for index, count in sorted(tokens.items())},
            **{f"tokens_per_s/{m.address.index}": rate for m in alive if (rate := m.rate) is not None},
        }
        return {f"fleet/{name}": float(value) for name, value in found.items()}

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
        self._probe_members()
        self._dispatcher.judge_rates()
        self._dispatcher.dispatch()
        self._changed.set()

    def _probe_members(self) -> None:
        now = time.monotonic()
        for member in self._members.values():
            interval_s = self._server.health_interval_s if member.answers else self._watch_interval_s
            if member.probe is None and now - member.probed_at >= interval_s:
                member.probe = asyncio.create_task(self._probe(member))
            if member.has_joined and member.answers and member.generation.is_due(self._server.health_interval_s):
                member.generation.probe = asyncio.create_task(self._probe_generation(member))

    async def _probe(self, member: Member) -> None:
        try:
            await self._ask(member)
        except Exception as error:  # an error in this program must not be taken for a server's
            self._fail(error)
        member.probe = None
        if member.probed_at < 0:  # a publication has ended meanwhile: the answer is from before it
            self._probe_members()

    async def _probe_generation(self, member: Member) -> None:
        was_well, limit_s = member.generation.is_well, self._server.generation_timeout_s
        try:
            found = await member.generation.ask(lambda: member.client.generates(min(GENERATION_PROBE_S, limit_s)))
        except OutOfFiles as error:
            self.out_of_files(error)
            return
        except Exception as error:  # an error in this program must not be taken for a server's
            self._fail(error)
            return
        finally:
            member.generation.probe = None
        if found is None:
            return
        if found != was_well:
            state = "generates again" if found else "answers, but generates nothing: it gets no new work"
            log.warning("%s %s", member.name, state)
        if member.generation.is_silent_for(limit_s):
            self.request_restart(
                [member.address],
                f"it answers, but has generated nothing for server.generation_timeout_s = {limit_s:g} s",
            )
        self._changed.set()
        self._dispatcher.dispatch(member)

    async def _ask(self, member: Member) -> None:
        """Asks the server for its version, and records whether it answers."""
        publications = self._publications
        member.probed_at = time.monotonic()
        try:
            version = await member.client.policy_version(min(MAX_PROBE_S, self._server.unhealthy_after_s))
        except RequestRefused as error:
            if not member.has_joined:  # wrong API key, or not a rollout server
                self._fail(error)
            self._unanswered(member, str(error))
        except InvalidAnswer as error:  # it answers, but with an invalid version
            self._answered(member, None, str(error), publications)
        except ServerUnavailable as error:
            self._unanswered(member, str(error))
        except OutOfFiles as error:
            self.out_of_files(error)
        else:
            self._answered(member, version, f"it holds version {version}", publications)

    def _answered(self, member: Member, version: int | None, described: str, publications: int) -> None:
        member.answered_at = time.monotonic()
        if not member.answers and member.has_joined:
            log.info("%s answers again", member.name)
        member.answers = True
        if not member.has_joined:
            member.has_joined, member.named_version = True, None
            member.generation.seen()  # serve has seen it generate before it announced the address
            self._counts["restarts"] += member.address.start > 0
            # Only the initial weights are recognized by the version that the server reports: any other weights may be
            # left from another run, or from a publication that was interrupted.
            member.held_version = version if version == self.version == 0 else None
            log.info("%s has joined (start %d): %s", member.name, member.address.start, described)
        elif publications == self._publications:  # otherwise the answer may be older than the last publication
            self._compare_version(member, version, described)
        self._changed.set()
        self._dispatcher.dispatch(member)

    def _compare_version(self, member: Member, version: int | None, described: str) -> None:
        if member.named_version is not None:
            if version == member.named_version:
                member.held_version = version
            else:
                log.warning("%s should hold version %d, but %s", member.name, member.named_version, described)
            member.named_version = None
        # During a publication the version may be higher already; a lower one means that the weights are lost.
        elif member.held_version is not None and (version is None or version < member.held_version):
            log.warning("%s has lost version %d: %s", member.name, member.held_version, described)
            self._counts["restarts"] += 1
            member.held_version = None

    def _unanswered(self, member: Member, described: str) -> None:
        if member.answers:
            log.warning("no new work for a server that does not answer: %s", described)
        member.answers = False
        if member.has_joined and time.monotonic() - member.answered_at > self._server.unhealthy_after_s:
            member.move_groups()

    def _remove(self, member: Member) -> None:
        """Removes a server whose address was withdrawn; its groups move to other servers."""
        del self._members[member.key]
        member.answers = False
        if member.num_groups:
            log.warning("%s is withdrawn; its %d groups move", member.name, member.num_groups)
        self._past_idle_s += member.idle_s()
        self._tokens_of[member.address.index] += member.num_tokens
        closing = asyncio.create_task(member.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
