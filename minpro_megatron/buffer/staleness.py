"""The arithmetic of staleness: which version samples a group, how many groups may start, which groups a step consumes.

Global steps count from 0, and step k consumes batch k. Policy version v exists once v steps are complete, so at step k
the trainer holds version k. A group's staleness at step k is k - (oldest version among its tokens).

**Delay mode**, delay n: batch k is sampled entirely with version max(0, k - n), so its staleness is min(k, n).

A run of N steps samples only the batches 0 .. N - 1. If it is extended from a checkpoint of version s > N - n, the
batches N .. s + n - 1 are missing, and the weights k - n < s that should have sampled them no longer exist. Version s
samples them instead, just as version 0 samples the first batches of a run: from batch N on, batch k is sampled with
version max(s, k - n), and its staleness grows from N - s back to n. Such a point is called a beginning (`Beginning`).

**Bounded mode**, bound eta: servers never wait, and weights change while responses are generated. Let U(u) be the
number of groups issued at version u or earlier that are neither consumed nor dropped. Two rules keep every group's
staleness at or below eta:

1. Admission: at version v groups start only while consumed + ready + in flight < (eta + v + 1) * batch. Groups that a
   filter dropped, or that a failure returned, are in none of the three and so free their place.
2. Consumption: step v takes the first `batch` ready groups in the order of issue, once the remaining groups satisfy
   U(u) <= (u + eta - v) * batch for every u <= v, so that old groups can still be consumed in time. Until then it
   waits.

Why this is sufficient: before step v, U(u) <= (u + eta - v + 1) * batch holds for every u <= v. For u < v this is rule
2 of step v - 1. For u = v it is rule 1: v * batch groups are consumed, so U(v) <= (eta + v + 1) * batch - v * batch.
Rule 2 for u = v - eta leaves no group of that age after step v, and a group's tokens are of the version at which it
was issued or newer: staleness <= eta. There is no deadlock: when all groups in flight have ended, the first `batch` of
them reduce every U(u) by `batch` or to 0, which satisfies rule 2; and rule 1 allows (v + 1) * batch groups by then,
enough for a batch. A group overtakes another only if the other is still in time, and no group is abandoned for its
length.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Beginning(NamedTuple):
    """Batches from `first_batch` on are sampled with `version` or a later one, because no earlier weights exist."""

    first_batch: int
    version: int


RUN_START = Beginning(first_batch=0, version=0)


def beginning_after(former_end: int | None, version: int, num_steps: int, delay: int) -> Beginning | None:
    """The beginning that a run of `num_steps` steps needs at the checkpoint of `version` in delay mode, if it had
    `former_end` steps when that checkpoint was saved. None if all batches of earlier weights were sampled.

    >>> beginning_after(former_end=6, version=6, num_steps=9, delay=2)
    Beginning(first_batch=6, version=6)
    >>> beginning_after(former_end=6, version=4, num_steps=9, delay=2) is None
    True
    """
    if former_end is None or former_end >= min(version + delay, num_steps):
        return None
    return Beginning(former_end, version)


def sampling_version(batch_index: int, delay: int, beginnings: Sequence[Beginning] = (RUN_START,)) -> int:
    """The policy version that samples batch `batch_index` in delay mode. The first of `beginnings` is RUN_START.

    Version k - n is the newest version that exists while step k - n runs. Batch k is generated then, n steps before it
    is consumed. Before step 0 there are only the initial weights, so batches 0 .. n share version 0.

    >>> [sampling_version(k, 2) for k in range(5)]
    [0, 0, 0, 1, 2]
    >>> [sampling_version(k, 2, (RUN_START, Beginning(6, 6))) for k in range(4, 10)]
    [2, 3, 6, 6, 6, 7]
    """
    return max(batch_index - delay, *(one.version for one in beginnings if one.first_batch <= batch_index))


def batches_of_version(
    version: int, delay: int, num_steps: int, beginnings: Sequence[Beginning] = (RUN_START,)
) -> list[int]:
    """The batches that version `version` samples in delay mode, in order; empty near the end of the run.

    The inverse of `sampling_version`: version 0 has batches 0 .. n, and every later one has batch v + n alone, as long
    as the run of `num_steps` steps consumes it. The last n + 1 versions (num_steps - n .. num_steps) have none.

    >>> [batches_of_version(v, 2, 5) for v in range(6)]
    [[0, 1, 2], [3], [4], [], [], []]
    """
    possible = range(version, min(version + delay + 1, num_steps))
    return [index for index in possible if sampling_version(index, delay, beginnings) == version]


def staleness(current_version: int, oldest_version: int) -> int:
    """Versions published since the oldest token of a group was sampled: what "n steps stale" counts."""
    return current_version - oldest_version


def expected_staleness(step: int, delay: int, beginnings: Sequence[Beginning] = (RUN_START,)) -> int:
    """The staleness of every group at global step `step` in delay mode. Without a further beginning it is
    step - max(0, step - n) = min(step, n)."""
    return step - sampling_version(step, delay, beginnings)


def admissible_groups(version: int, max_staleness: int, num_steps: int, num_prompts: int, existing: int) -> int:
    """How many groups may start now in bounded mode; `existing` = consumed + ready + in flight.

    A run of `num_steps` steps never needs more than num_steps * num_prompts of them.

    >>> admissible_groups(version=0, max_staleness=2, num_steps=10, num_prompts=4, existing=5)
    7
    """
    return max(0, min(max_staleness + version + 1, num_steps) * num_prompts - existing)


class IssuedAt(NamedTuple):
    """A group in the order of issue: by the version at which it was issued, then by its number."""

    version: int
    group_id: int


def may_take_batch(
    step: int, max_staleness: int, num_prompts: int, ready: Mapping[int, int], in_flight: Mapping[int, int]
) -> bool:
    """Whether step `step` may consume the first `num_prompts` ready groups in the order of issue (bounded mode).

    `ready` and `in_flight` are numbers of groups by the version at which these were issued: only the few versions of
    unconsumed groups matter, however many groups there are.

    >>> may_take_batch(2, 2, 1, ready={1: 1, 0: 1}, in_flight={})
    True
    >>> may_take_batch(2, 2, 1, ready={1: 1}, in_flight={1: 1})  # that one can still be consumed at step 3
    True
    >>> may_take_batch(2, 2, 1, ready={1: 1}, in_flight={0: 1})  # that one would be too old at step 3
    False
    """
    to_take, num_left = num_prompts, 0
    for version in sorted({*ready, *in_flight}):
        taken = min(to_take, ready.get(version, 0))
        to_take -= taken
        num_left += ready.get(version, 0) - taken + in_flight.get(version, 0)
        if num_left > max(0, version + max_staleness - step) * num_prompts:
            return False
    return to_take == 0


def evaluated_versions(num_steps: int, every_steps: int) -> list[int]:
    """The versions that are evaluated: the first, the last, each multiple of `every_steps` (0: no others).

    >>> evaluated_versions(5, 2)
    [0, 2, 4, 5]
    """
    between = range(every_steps, num_steps, every_steps) if every_steps else ()
    return [0, *between, num_steps]
