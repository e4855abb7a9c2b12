"""Decides which groups start when, which ones a step consumes, and when new weights may be published. No input/output.

A schedule keeps the state of every group that is not yet consumed. The collector reports events to it and asks it what
may happen. Both modes (buffer/staleness.py has the arithmetic) offer the same methods: `to_issue`, `collected`,
`batch`, `consumed`, `may_publish`, `published`. Group ids follow the order in which groups are first issued.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from minpro_megatron.buffer.staleness import (
    RUN_START,
    Beginning,
    IssuedAt,
    admissible_groups,
    batches_of_version,
    may_take_batch,
    sampling_version,
)
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import ProjectError

# Limit on dropped groups for one batch, as a multiple of the batch: beyond it the prompts give no training signal.
MAX_DROPPED_FACTOR = 20


class Slot(NamedTuple):
    """A group to be sampled. `batch_index` is -1 if the step that will consume it is not decided yet."""

    group_id: int
    batch_index: int
    version: int


class Restored(NamedTuple):
    """An unconsumed group of an interrupted run: already sampled (`ready`), or to be sampled again."""

    slot: Slot
    ready: bool
    dropped: bool = False


class Chosen(NamedTuple):
    """The groups of a step, in canonical order, and the groups that were sampled for it but are not used."""

    group_ids: list[int]
    surplus: list[int]


class ScheduleError(ProjectError):
    """The run cannot continue; the message is one line with the reason and a remedy."""


class Schedule(Protocol):
    """What the collector needs from either mode. `version` is the version that the servers hold."""

    version: int

    def to_issue(self) -> list[Slot]:
        """The groups that may start now; each is returned once."""
        ...

    def collected(self, group_id: int, accepted: bool) -> None:
        """Records that a group has ended; `accepted` is False if it is dropped. Raises ScheduleError if too many are
        dropped."""
        ...

    def batch(self, step: int) -> Chosen | None:
        """The groups that step `step` consumes; None while it has to wait. Repeated calls return the same groups."""
        ...

    def is_sampled_by_now(self, step: int) -> bool:
        """Whether waiting for the batch of `step` can end without a publication."""
        ...

    def consumed(self, step: int) -> None: ...

    def may_publish(self) -> bool:
        """Whether the weights may be replaced by those of version + 1 now."""
        ...

    def published(self) -> None:
        """Records that the servers hold version + 1."""
        ...


@dataclass
class _DelayBatch:
    in_flight: set[int] = field(default_factory=set)
    accepted: list[int] = field(default_factory=list)
    num_dropped: int = 0


class DelaySchedule:
    """Batch k is sampled entirely with version max(0, k - n), and a version is published when its batches are complete.

    The batches of a version are issued in waves. Each wave has as many groups as the batches still need, times
    `over_sampling` where batch.dynamic_sampling or data.filter drops some of them. A batch consists of its first
    accepted groups once a wave has ended with enough of them. Without those filters one wave is enough, unless a group
    could not be graded. A wave starts when the previous one has ended for all batches of the version, so that the
    prompt that replaces a dropped one does not depend on which group ends first.
    """

    def __init__(
        self,
        config: RunConfig,
        version: int = 0,
        restored: Iterable[Restored] = (),
        next_group: int = 0,
        beginnings: Sequence[Beginning] = (RUN_START,),
    ) -> None:
        self.version = version
        self._beginnings = beginnings
        self._delay = config.staleness.delay_steps
        self._num_steps = config.num_global_steps
        self._num_prompts = config.batch.num_prompts
        self._over_sampling = config.batch.over_sampling if config.drops_groups else 1.0
        self._next_group = next_group
        self._next_step = version
        self._batches: dict[int, _DelayBatch] = {}
        self._batch_of: dict[int, int] = {}
        self._to_repeat: list[Slot] = []
        for group in restored:
            self._restore(group)
        self._refuse_missing_batches()

    def _refuse_missing_batches(self) -> None:
        for index in range(self.version, min(self.version + self._delay, self._num_steps)):
            sampled_by = sampling_version(index, self._delay, self._beginnings)
            if sampled_by < self.version and not self._is_complete(self._batches.get(index)):
                raise ScheduleError(
                    f"batch {index}, which version {sampled_by} was to sample, is not in the journal: the journal is "
                    "older than the checkpoint; restore the journal that belongs to the checkpoint, resume from an "
                    "earlier checkpoint, or start under a new name"
                )

    def _restore(self, group: Restored) -> None:
        slot = group.slot
        batch = self._batches.setdefault(slot.batch_index, _DelayBatch())
        if group.dropped:
            batch.num_dropped += 1
            return
        self._batch_of[slot.group_id] = slot.batch_index
        if group.ready:
            batch.accepted.append(slot.group_id)
        else:
            batch.in_flight.add(slot.group_id)
            self._to_repeat.append(slot)

    def to_issue(self) -> list[Slot]:
        slots, self._to_repeat = self._to_repeat, []
        indices = batches_of_version(self.version, self._delay, self._num_steps, self._beginnings)
        batches = {i: self._batches.setdefault(i, _DelayBatch()) for i in indices if i >= self._next_step}
        if any(batch.in_flight for batch in batches.values()):
            return slots
        for index, batch in batches.items():
            wanted = self._num_prompts - len(batch.accepted)
            for _ in range(math.ceil(wanted * self._over_sampling)):
                slots.append(Slot(self._next_group, index, self.version))
                self._batch_of[self._next_group] = index
                batch.in_flight.add(self._next_group)
                self._next_group += 1
        return slots

    def collected(self, group_id: int, accepted: bool) -> None:
        batch = self._batches[self._batch_of[group_id]]
        batch.in_flight.remove(group_id)
        if accepted:
            batch.accepted.append(group_id)
            return
        del self._batch_of[group_id]
        batch.num_dropped += 1
        _refuse_hopeless_filter(batch.num_dropped, self._num_prompts)

    def batch(self, step: int) -> Chosen | None:
        batch = self._batches.get(step)
        if batch is None or not self._is_complete(batch):
            return None
        accepted = sorted(batch.accepted)
        return Chosen(accepted[: self._num_prompts], accepted[self._num_prompts :])

    def is_sampled_by_now(self, step: int) -> bool:
        return sampling_version(step, self._delay, self._beginnings) <= self.version

    def consumed(self, step: int) -> None:
        for group_id in self._batches.pop(step).accepted:
            del self._batch_of[group_id]
        self._next_step = step + 1

    def may_publish(self) -> bool:
        indices = batches_of_version(self.version, self._delay, self._num_steps, self._beginnings)
        return all(index < self._next_step or self._is_complete(self._batches.get(index)) for index in indices)

    def published(self) -> None:
        self.version += 1

    def _is_complete(self, batch: _DelayBatch | None) -> bool:
        return batch is not None and not batch.in_flight and len(batch.accepted) >= self._num_prompts


class _ByVersion:
    """Groups by id, and how many of them were issued at each version."""

    def __init__(self) -> None:
        self._groups: dict[int, IssuedAt] = {}
        self.counts: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, group: IssuedAt) -> None:
        self._groups[group.group_id] = group
        self.counts[group.version] += 1

    def pop(self, group_id: int) -> IssuedAt:
        group = self._groups.pop(group_id)
        self.counts[group.version] -= 1
        if not self.counts[group.version]:
            del self.counts[group.version]
        return group

    def first(self, count: int) -> list[int]:
        """The first ids in the order of issue."""
        return [group.group_id for group in sorted(self._groups.values())[:count]]


class BoundedSchedule:
    """Servers never wait; a step consumes groups of staleness <= max_staleness, in the order of issue."""

    def __init__(
        self, config: RunConfig, version: int = 0, restored: Iterable[Restored] = (), next_group: int = 0
    ) -> None:
        self.version = version
        self._max_staleness = config.staleness.max_staleness
        self._num_steps = config.num_global_steps
        self._num_prompts = config.batch.num_prompts
        self._next_group = next_group
        self._num_consumed = version * self._num_prompts
        self._num_dropped_since = 0  # the last consumed batch
        self._ready = _ByVersion()
        self._in_flight = _ByVersion()
        self._taken: dict[int, list[int]] = {}
        self._to_repeat: list[Slot] = []
        for group in restored:
            slot = group.slot
            if group.ready:
                self._ready.add(IssuedAt(slot.version, slot.group_id))
            elif not group.dropped:  # it is sampled again, with the current weights
                self._in_flight.add(IssuedAt(version, slot.group_id))
                self._to_repeat.append(Slot(slot.group_id, -1, version))

    def to_issue(self) -> list[Slot]:
        slots, self._to_repeat = self._to_repeat, []
        existing = self._num_consumed + len(self._ready) + len(self._in_flight)
        free = admissible_groups(self.version, self._max_staleness, self._num_steps, self._num_prompts, existing)
        for group_id in range(self._next_group, self._next_group + free):
            slots.append(Slot(group_id, -1, self.version))
            self._in_flight.add(IssuedAt(self.version, group_id))
        self._next_group += free
        return slots

    def collected(self, group_id: int, accepted: bool) -> None:
        issued = self._in_flight.pop(group_id)
        if accepted:
            self._ready.add(issued)
            return
        self._num_dropped_since += 1
        _refuse_hopeless_filter(self._num_dropped_since, self._num_prompts)

    def batch(self, step: int) -> Chosen | None:
        if step not in self._taken:
            if step != self.version:
                return None  # the groups that it may consume depend on the version at which the step starts
            if len(self._ready) < self._num_prompts or not may_take_batch(
                step, self._max_staleness, self._num_prompts, self._ready.counts, self._in_flight.counts
            ):
                return None
            self._taken[step] = self._ready.first(self._num_prompts)
        return Chosen(self._taken[step], [])

    def is_sampled_by_now(self, step: int) -> bool:
        return step <= self.version

    def consumed(self, step: int) -> None:
        for group_id in self._taken.pop(step):
            self._ready.pop(group_id)
        self._num_consumed += self._num_prompts
        self._num_dropped_since = 0

    def may_publish(self) -> bool:
        return True

    def published(self) -> None:
        self.version += 1


def make_schedule(
    config: RunConfig,
    version: int = 0,
    restored: Iterable[Restored] = (),
    next_group: int = 0,
    beginnings: Sequence[Beginning] = (RUN_START,),
) -> Schedule:
    """The schedule of the run's mode at `version`, with the unconsumed groups of an interrupted run.
    `next_group` is the first id that has not been used. `beginnings` are used in delay mode only."""
    if config.staleness.mode == "delay":
        return DelaySchedule(config, version, restored, next_group, beginnings)
    return BoundedSchedule(config, version, restored, next_group)


def _refuse_hopeless_filter(num_dropped: int, num_prompts: int) -> None:
    if num_dropped > MAX_DROPPED_FACTOR * num_prompts:
        raise ScheduleError(
            f"{num_dropped} groups were dropped for a batch of batch.num_prompts = {num_prompts}, either because their "
            "rewards were equal (batch.dynamic_sampling), because data.filter dropped them, or because they could not "
            "be graded (reward/groups_not_graded). In the first two cases the prompts are all too easy or all too hard "
            "for this policy: choose others, or set batch.dynamic_sampling to false and correct data.filter; in the "
            "last case correct the grader"
        )
