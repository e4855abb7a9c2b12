"""The metrics of the servers, including those of servers that have left."""

from collections import Counter
from collections.abc import Collection, Mapping

from minpro_megatron.fleet.member import Member

_ALWAYS_REPORTED = ("groups", "retries", "moved_groups", "restarts", "hung", "out_of_files")


class FleetTotals:
    """Totals since the start; `counts` has one counter for each metric fleet/<name>."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._past_idle_s = 0.0
        self._tokens_of: Counter[int] = Counter()  # by index

    def removed(self, member: Member) -> None:
        """Keeps the totals of a server that leaves."""
        self._past_idle_s += member.idle_time.total_s()
        self._tokens_of[member.address.index] += member.num_tokens

    def metrics(
        self, current: Mapping[str, float], members: Collection[Member], alive: Collection[Member]
    ) -> dict[str, float]:
        """The totals with those of the `members`, the `current` values, and the rates of those that are `alive`."""
        tokens = Counter(self._tokens_of)
        tokens.update({member.address.index: member.num_tokens for member in members})
        idle_s = self._past_idle_s + sum(member.idle_time.total_s() for member in members)
        found = {
            **current,
            "idle_s": idle_s,
            **{name: self.counts[name] for name in _ALWAYS_REPORTED},
            **self.counts,
            **{f"tokens/{index}": count for index, count in sorted(tokens.items())},
            **{f"tokens_per_s/{m.address.index}": rate for m in alive if (rate := m.rate.tokens_per_s) is not None},
        }
        return {f"fleet/{name}": float(value) for name, value in found.items()}
