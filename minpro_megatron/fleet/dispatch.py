"""Chooses the server for the next group: groups wait in a queue until a suitable server has capacity.

Capacity is counted in requests, which a server runs concurrently. A group has one request per response.
"""

import asyncio
import heapq
import logging
import statistics
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from minpro_megatron.fleet.loads import Loads
from minpro_megatron.fleet.member import Key, Member

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True, slots=True)
class Ticket:
    """A group's position in the queue. All training groups come before all evaluation groups, because the trainer waits
    for them."""

    is_evaluation: bool
    number: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    future: asyncio.Future[Member]
    num_requests: int
    tried: Collection[Key]


class Dispatcher:
    """Gives each waiting group the least loaded of the servers that `current` returns; `is_current` says whether a
    server is among them.

    At most `max_requests` requests are in flight on a server, or one group if it has more. A server whose responses
    grow `slow_factor` times slower than the servers' median gets work only when the others are full. `max_groups` is
    the limit over all servers.
    """

    def __init__(
        self,
        current: Callable[[], Iterable[Member]],
        is_current: Callable[[Member], bool],
        max_requests: int,
        slow_factor: float,
        max_groups: int | None = None,
    ) -> None:
        self._current, self._is_current = current, is_current
        self._max_requests = max_requests
        self._max_groups = max_groups
        self._num_groups = 0  # in flight
        self._slow_factor = slow_factor
        self._waiting: list[tuple[Ticket, int, _Waiting]] = []
        self._num_waits = 0  # breaks ties in the heap above
        self._slow: set[Key] = set()
        self._fast_loads, self._slow_loads = Loads(is_current), Loads(is_current)

    @property
    def num_waiting(self) -> int:
        return sum(not group.future.done() for _, _, group in self._waiting)

    @property
    def num_slow(self) -> int:
        return len(self._slow)

    async def acquire(self, ticket: Ticket, num_requests: int, tried: Collection[Key]) -> Member:
        """A server with capacity for a group of `num_requests` requests; call `release` afterwards. Waiting groups are
        served in the order of their tickets, lowest first.

        Servers in `tried` are used only if there is no other. Raises the error that was passed to `fail`.
        """
        future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (ticket, self._num_waits, _Waiting(future, num_requests, tried)))
        self._num_waits += 1
        self._assign()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() and future.exception() is None:
                self.release(future.result(), num_requests)  # a server was assigned at the same moment
            raise

    def release(self, member: Member, num_requests: int) -> None:
        """Records that the group for which `acquire` returned this server has ended there."""
        self._num_groups -= 1
        member.release(num_requests)
        loads = self._loads_of(member)
        if member in loads:
            loads.put(member)
        self._assign()

    def change_load(self, member: Member, num_requests: int) -> None:
        """Counts so many requests more (or fewer) for a server that a group holds, because some of the group's
        responses wait for something else meanwhile. The server may have too many when they continue."""
        member.num_requests += num_requests
        loads = self._loads_of(member)
        if member in loads:
            loads.put(member)
        if num_requests < 0:
            self._assign()

    def dispatch(self, changed: Member | None = None) -> None:
        """Assigns servers to waiting groups. Call it whenever a server may accept more work than before: `changed`, or
        any server if it is None."""
        if changed is None:
            self._list_again()
        elif self._is_current(changed):
            self._loads_of(changed).put(changed)
        self._assign()

    def _list_again(self) -> None:
        current = list(self._current())
        self._fast_loads.replace(member for member in current if member.key not in self._slow)
        self._slow_loads.replace(member for member in current if member.key in self._slow)

    def _loads_of(self, member: Member) -> Loads:
        return self._slow_loads if member.key in self._slow else self._fast_loads

    def _assign(self) -> None:
        while self._waiting:
            _, _, group = self._waiting[0]
            if not group.future.done():
                member = self._choose(group)
                if member is None:
                    return
                self._num_groups += 1
                member.take(group.num_requests)
                self._loads_of(member).put(member)
                group.future.set_result(member)
            heapq.heappop(self._waiting)

    def fail(self, error: Exception) -> None:
        """Raises `error` in all waiting `acquire` calls, now or later."""
        for _, _, group in self._waiting:
            if not group.future.done():
                group.future.set_exception(error)
        self._waiting.clear()

    def judge_rates(self) -> None:
        """Checks again which servers are far slower than the others, and logs newly slow ones."""
        members = {member.key: member for member in self._current()}
        rates = {key: rate for key, member in members.items() if (rate := member.rate.tokens_per_s) is not None}
        median = statistics.median_high(rates.values()) if rates else 0.0
        slow = {key for key, rate in rates.items() if rate < median / self._slow_factor}
        for key in slow - self._slow:
            log.warning(
                "%s: %.1f tokens/s per response, the median is %.1f (server.slow_factor = %g): it gets work last",
                members[key].name, rates[key], median, self._slow_factor,
            )  # fmt: skip
        if slow != self._slow:
            self._slow = slow
            self._list_again()

    def _choose(self, group: _Waiting) -> Member | None:
        if self._max_groups is not None and self._num_groups >= self._max_groups:
            return None
        if not group.tried:
            for loads in (self._fast_loads, self._slow_loads):
                member = loads.least()
                if member is not None and self._has_room(member, group.num_requests):
                    return member
            return None
        # after a failure, which is rare: all servers are compared
        free = [m for m in self._current() if not m.suspension.is_active and self._has_room(m, group.num_requests)]
        return min(free, key=lambda m: (m.key in group.tried, m.key in self._slow, m.num_requests, m.key), default=None)

    def _has_room(self, member: Member, num_requests: int) -> bool:
        # a group with more requests than a server may have still has to be sampled somewhere
        return member.num_requests == 0 or member.num_requests + num_requests <= self._max_requests
