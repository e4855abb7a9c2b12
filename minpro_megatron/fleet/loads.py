"""Servers in order of their load, for the choice of the next one in time proportional to log(servers)."""

import heapq
from collections.abc import Callable, Iterable

from minpro_megatron.fleet.member import Key, Member


class Loads:
    """The members that may be given work, in a heap by (requests, key).

    The heap also holds entries of earlier loads, which are skipped. A member that may not be given work when its entry
    comes to the front is removed, and `put` adds it again: call it for every change after which a member may be given
    more work than before. A suspended member returns by itself.
    """

    def __init__(self, may_work: Callable[[Member], bool]) -> None:
        self._may_work = may_work
        self._heap: list[tuple[int, Key]] = []
        self._members: dict[Key, Member] = {}
        self._listed: dict[Key, int] = {}  # the load in the entry that counts
        self._suspended: list[Member] = []

    def replace(self, members: Iterable[Member]) -> None:
        """The members are these from now on."""
        self._members = {member.key: member for member in members}
        self._listed = {key: member.num_requests for key, member in self._members.items()}
        self._heap = [(load, key) for key, load in self._listed.items()]
        heapq.heapify(self._heap)
        self._suspended.clear()

    def put(self, member: Member) -> None:
        """Lists a member with its current load."""
        key, load = member.key, member.num_requests
        if self._listed.get(key) == load:
            return
        self._members[key], self._listed[key] = member, load
        heapq.heappush(self._heap, (load, key))
        if len(self._heap) > 8 * len(self._listed) + 64:  # mostly earlier loads
            self._heap = [(load, key) for key, load in self._listed.items()]
            heapq.heapify(self._heap)

    def discard(self, member: Member) -> None:
        self._listed.pop(member.key, None)
        self._members.pop(member.key, None)

    def __contains__(self, member: Member) -> bool:
        return self._members.get(member.key) is member

    def least(self) -> Member | None:
        """The least loaded member that may be given work now."""
        self._resume()
        while self._heap:
            load, key = self._heap[0]
            if self._listed.get(key) != load:
                heapq.heappop(self._heap)
                continue
            member = self._members[key]
            if member.suspension.is_active:
                self._suspended.append(member)
            elif self._may_work(member):
                return member
            heapq.heappop(self._heap)
            self.discard(member)
        return None

    def _resume(self) -> None:
        suspended, self._suspended = self._suspended, []
        for member in suspended:
            if member.suspension.is_active:
                self._suspended.append(member)
            else:
                self.put(member)
