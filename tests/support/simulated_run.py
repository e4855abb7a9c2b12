"""A run in miniature, in simulated time: a schedule, servers, a trainer, crashes. Nothing sleeps, nothing is on disk.

The trainer keeps the order of a run. Groups take times that differ by a factor of a
thousand, fail and restart, are dropped by a filter. A crash forgets everything but the journal and the checkpoints.
What must always hold is asserted where it happens.
"""

import asyncio
import heapq
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.route_files import RouteFiles
from minpro_megatron.buffer.schedule import Restored, ScheduleError, Slot, make_schedule
from minpro_megatron.buffer.staleness import RUN_START, Beginning, beginning_after
from minpro_megatron.buffer.step_order import Fetch, Publish, Release, Save, StepOrder, Train, steps_ahead
from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import Batch, CollectedGroup
from tests.support.journal_in_memory import LOG_PROBS, Inline, InMemoryFile, issued_group, sampled, with_scores
from tests.support.rollout_fakes import run_config

MAX_EVENTS = 20_000  # of a run that needs some hundred

Wait = Callable[[], object]


def simulate(runs: Iterable["SimulatedRun"]) -> None:
    """Raises AssertionError, with its place in the order, for the first of the runs that goes wrong."""

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(Inline(1))
        for place, run in enumerate(runs):
            try:
                await run.run()
            except (AssertionError, JournalError, ScheduleError) as error:
                raise AssertionError(f"run {place}: {error}") from error

    asyncio.run(main())


class Checkpoint(NamedTuple):
    version: int
    number_of_event: int  # at which the journal was flushed for it
    num_steps: int  # of the run, when it was saved


class Flight(NamedTuple):
    slot: Slot
    first_version: int  # of its tokens


BASE = run_config(Path("unused"))


def random_config(rng: random.Random, mode: str) -> RunConfig:
    dynamic = rng.random() < 0.4
    batch = {
        "num_prompts": rng.randint(1, 4),
        "dynamic_sampling": dynamic,
        "over_sampling": rng.choice([1.0, 1.5, 3.0]),
    }
    placement = rng.choice(["disaggregated", "shared"]) if mode == "delay" else "disaggregated"
    staleness = {"mode": mode, "delay_steps": rng.randint(0, 4), "max_staleness": rng.randint(1, 4)}
    return BASE.model_copy(
        update={
            "num_global_steps": rng.randint(1, 8),
            "batch": BASE.batch.model_copy(update=batch),
            "staleness": BASE.staleness.model_copy(update=staleness),
            "server": BASE.server.model_copy(update={"placement": placement}),
            "publish": BASE.publish.model_copy(update={"at_start": rng.random() < 0.5}),
        }
    )


class SimulatedRun:
    """`await run()` goes through the whole run and raises AssertionError where it does wrong."""

    def __init__(
        self,
        rng: random.Random,
        mode: str,
        *,
        journal: bool = False,
        faults: bool = True,
        config: RunConfig | None = None,
    ) -> None:
        self.config = config or random_config(rng, mode)
        self._rng = rng
        self._faults = rng.choice([0.0, 0.1, 0.3]) if faults else 0.0
        self._drops = rng.choice([0.1, 0.4]) if self.config.batch.dynamic_sampling else 0.0
        self._crashes = rng.choice([0.01, 0.03, 0.1]) if journal else 0.0
        self._crashes_left = rng.randint(1, 4)
        self._trainer_speed = rng.choice([0.1, 1.0, 10.0])
        self._keep_steps = rng.choice([0, 1, 50])  # collector.journal_keep_steps
        self._file = InMemoryFile() if journal else None
        self._journal = Journal(self._file, RouteFiles(Path("unused"))) if self._file else None
        # what is pruned cannot be trained again in delay mode, whose weights for it are gone
        self._may_go_back = self.config.staleness.mode == "bounded" or not self._keep_steps
        self._num_events = 0
        self._checkpoints = [Checkpoint(0, 0, self.config.num_global_steps)]
        self._extensions_left = rng.choice([0, 0, 1, 2]) if journal else 0
        self._beginnings: list[Beginning] = [RUN_START]
        self._being_written: list[Checkpoint] = []
        self._copies: list[tuple[int, bytes]] = []  # (event, the journal then)
        self.trained: list[list[int]] = []
        self.dropped: set[int] = set()
        self.lengths: dict[int, float] = {}  # time in flight, by group id
        self.issued_at: dict[int, int] = {}
        self.num_incarnations = 0

    async def run(self) -> None:
        version = 0
        while True:
            if not await self._incarnation(version):
                version = await self._after_crash()
            elif self._extensions_left:
                version = await self._make_longer()
            else:
                break
        self._check_end()

    async def _make_longer(self) -> int:
        """The version of the last checkpoint, which is that of the end; the run gets more steps."""
        self._extensions_left -= 1
        assert self._journal is not None
        await self._journal.flush()
        ended = self.config.num_global_steps
        self._being_written.clear()
        self._checkpoints.append(Checkpoint(ended, self._num_events, ended))
        self._copies.clear()
        self.config = self.config.model_copy(update={"num_global_steps": ended + self._rng.randint(1, 6)})
        return ended

    async def _incarnation(self, version: int) -> bool:
        """True if the run has come to its end, False if it has crashed."""
        await self._restore(version)
        self.num_incarnations += 1
        self._heap: list[tuple[float, int, int]] = [(0.0, -1, -1)]  # (time, order, group id; -1: the trainer)
        self._order = itertools.count()
        self._flights: dict[int, Flight] = {}
        self._now = 0.0
        trainer, wait = self._trainer(version), None
        while True:
            self._num_events += 1
            assert self._num_events < MAX_EVENTS, "the run does not end"
            if self._rng.random() < self._crashes and self._crashes_left:
                self._crashes_left -= 1
                return False
            if self._serving:
                await self._issue()
            if wait is not None and wait():
                wait = None
                heapq.heappush(self._heap, (self._now, next(self._order), -1))
            assert self._heap, f"deadlock at version {self._schedule.version}, {len(self.trained)} steps trained"
            self._now, _, group_id = heapq.heappop(self._heap)
            if group_id >= 0:
                await self._end_flight(group_id)
                continue
            try:
                wait = await anext(trainer)
            except StopAsyncIteration:
                return True
            if wait is None:
                takes = self._rng.random() * self._trainer_speed
                heapq.heappush(self._heap, (self._now + takes, next(self._order), -1))

    async def _restore(self, version: int) -> None:
        restored, next_group = [], 0
        self._groups: dict[int, CollectedGroup] = {}
        if self._journal is not None:
            exact = self.config.staleness.mode == "delay"
            rows, next_group = await self._journal.restore(version, self.config.batch.num_prompts, exact)
            for row in rows:
                slot = Slot(row.group_id, row.batch_index, row.issued_version)
                restored.append(Restored(slot, bool(row.responses), row.dropped))
                if row.responses:
                    self._groups[row.group_id] = CollectedGroup(issued=issued_group(slot), responses=row.responses)
            await self._restore_beginnings(version)
        self._schedule = make_schedule(self.config, version, restored, next_group, self._beginnings)
        self._serving = version == 0 and not self.config.publishes_at_start
        self._ids_of_incarnation: set[int] = set()

    async def _restore_beginnings(self, version: int) -> None:
        assert self._journal is not None
        num_steps, former_end = self.config.num_global_steps, self._checkpoints[-1].num_steps
        added = beginning_after(former_end, version, num_steps, self.config.staleness.delay_steps)
        if added is not None and version > 0:
            await self._journal.begin(added)
        self._beginnings = await self._journal.beginnings()

    async def _issue(self) -> None:
        slots = self._schedule.to_issue()
        if self._journal is not None and slots:
            await self._journal.issue([issued_group(slot) for slot in slots])
        for slot in slots:
            assert slot.version == self._schedule.version, "to be sampled with weights that are gone"
            assert slot.group_id not in self._ids_of_incarnation, "issued twice"
            assert slot.group_id not in itertools.chain.from_iterable(self.trained), "trained, and issued again"
            self._ids_of_incarnation.add(slot.group_id)
            self.issued_at[slot.group_id] = slot.version
            self.lengths[slot.group_id] = 10 ** self._rng.uniform(-1.5, 1.5)
            self._fly(slot)

    def _fly(self, slot: Slot) -> None:
        self._flights[slot.group_id] = Flight(slot, self._schedule.version)
        at = self._now + self.lengths[slot.group_id]
        heapq.heappush(self._heap, (at, next(self._order), slot.group_id))

    async def _end_flight(self, group_id: int) -> None:
        slot, first_version = self._flights.pop(group_id)
        if self.config.staleness.mode == "delay":
            assert slot.version == self._schedule.version, "the weights were replaced under it"
        if self._rng.random() < self._faults:
            self._fly(slot)
            return
        accepted = self._rng.random() >= self._drops
        group = sampled(slot, first_version, self._schedule.version)
        if self._journal is not None:
            await self._journal.collect(group, accepted)
        self._schedule.collected(group_id, accepted)
        if accepted:
            self._groups[group_id] = group
        else:
            self.dropped.add(group_id)

    async def _trainer(self, first: int) -> AsyncIterator[Wait | None]:
        """The order of a run: yields None where time passes, and what it waits for where it does."""
        ahead, in_turns = steps_ahead(self.config.staleness), self.config.server.takes_turns
        order = StepOrder(self.config.num_global_steps, ahead, first, in_turns)
        yield None
        if not self._serving:
            await self._publish(first)
        for fetch in order.before_first_step():
            yield lambda index=fetch.batch: self._schedule.batch(index)
            await self._score(fetch.batch)
        for step in order.steps:
            for event in order.of_step(step):
                match event:
                    case Release():
                        yield self._schedule.may_publish
                        self._serving = False  # what is issued now would be sampled by servers without memory
                    case Fetch(index):
                        assert self._schedule.is_sampled_by_now(index)
                        yield lambda index=index: self._schedule.batch(index)
                        await self._score(index)
                    case Train():
                        yield None
                        await self._consume(step)
                    case Publish(version):
                        yield self._schedule.may_publish
                        await self._publish(version)
                    case Save(version):
                        yield None
                        await self._save(version)

    async def _score(self, index: int) -> None:
        chosen = self._schedule.batch(index)
        assert chosen is not None
        assert len(chosen.group_ids) == self.config.batch.num_prompts
        unscored = [group for id_ in chosen.group_ids if not (group := self._groups[id_]).is_scored]
        if self._journal is not None and unscored:
            await self._journal.score(index, [(group, [LOG_PROBS]) for group in unscored])
        for group in unscored:
            self._groups[group.issued.group_id] = with_scores(group)

    async def _consume(self, step: int) -> None:
        chosen = self._schedule.batch(step)
        assert chosen is not None
        assert step == self._schedule.version == len(self.trained)
        groups = [self._groups.pop(group_id) for group_id in chosen.group_ids]
        found = [step - group.oldest_version for group in groups]
        settings = self.config.staleness
        if settings.mode == "delay":
            # right after a beginning the staleness grows from 0, everywhere else it is the delay
            last = max(one for one in self._beginnings if one.first_batch <= step)
            expected = min(step - last.version, settings.delay_steps)
            assert found == [expected] * len(groups), f"staleness {found} instead of {expected}"
            assert all(group.newest_version == group.oldest_version for group in groups), "of several versions"
        else:
            assert all(0 <= value <= settings.max_staleness for value in found), f"staleness {found}"
        assert not {*chosen.group_ids} & {*itertools.chain.from_iterable(self.trained)}, "trained twice"
        assert all(group.is_scored for group in groups)
        if self._journal is not None:
            await self._journal.consume(Batch(index=step, groups=groups), found, chosen.surplus)
        self._schedule.consumed(step)
        self.trained.append(list(chosen.group_ids))
        self.dropped.update(chosen.surplus)

    async def _publish(self, version: int) -> None:
        if self._journal is not None and version:
            await self._journal.publish(version)
        if version != self._schedule.version:
            self._schedule.published()
        assert self._schedule.version == version
        self._serving = True

    async def _save(self, version: int) -> None:
        """A checkpoint now and then; its files are complete some steps later."""
        if self._journal is None or self._file is None:
            return
        if self._rng.random() < 0.6:
            await self._journal.flush()
            self._being_written.append(Checkpoint(version, self._num_events, self.config.num_global_steps))
        self._copies.append((self._num_events, self._file.copy()))
        while self._being_written and self._rng.random() < 0.6:
            self._checkpoints.append(self._being_written.pop(0))
            if self._keep_steps:
                complete = self._checkpoints[-1].version
                await self._journal.prune(min(complete, self._schedule.version - self._keep_steps))

    async def _after_crash(self) -> int:
        """The version to go on from. Some crashes are power cuts: the journal loses what it wrote since a flush. Some
        checkpoints turn out damaged, and the one before is taken."""
        if self._being_written and self._rng.random() < 0.5:
            self._checkpoints.append(self._being_written[0])
        if len(self._checkpoints) > 1 and self._may_go_back and self._rng.random() < 0.4:
            self._checkpoints.pop()
        self._being_written.clear()
        taken = self._checkpoints[-1]
        copies = [copy for event, copy in self._copies if event >= taken.number_of_event]
        if self._file is not None and copies and self._rng.random() < 0.3:
            self._file.put_back(self._rng.choice(copies))
        self._copies.clear()
        del self.trained[taken.version :]
        return taken.version

    def _check_end(self) -> None:
        settings, num_steps = self.config.staleness, self.config.num_global_steps
        assert len(self.trained) == self._schedule.version == num_steps
        consumed = set(itertools.chain.from_iterable(self.trained))
        issued_at, dropped = self.issued_at, self.dropped
        if self._file is not None:
            rows = self._file.rows("SELECT group_id, issued_version, state, consumed_step FROM groups")
            steps = dict(steps_of(self.trained))
            assert {row[0]: row[3] for row in rows if row[2] == "consumed"} == steps
            issued_at = {row[0]: row[1] for row in rows}
            dropped = {row[0] for row in rows if row[2] == "dropped"}
        assert sorted(issued_at) == list(range(len(issued_at))), "a group, and with it a prompt, is missing"
        assert not consumed & dropped
        pending = issued_at.keys() - consumed - dropped
        if settings.mode == "delay":
            assert not pending, f"groups {sorted(pending)} are neither trained nor dropped"
        else:
            assert all(issued_at[group_id] >= num_steps - settings.max_staleness for group_id in pending), "given up"


def steps_of(trained: list[list[int]]) -> Iterator[tuple[int, int]]:
    return ((group_id, step) for step, group_ids in enumerate(trained) for group_id in group_ids)
