"""Runs that crash at every request of the trainer and go on: every group once, and in delay mode the very same run."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_file import FILE_NAME
from minpro_megatron.collector.leases import Conflict
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.records import Batch, CollectorTotals
from tests.support.collector_rig import Crash, FakeTrainer, collecting, contents
from tests.support.rollout_fakes import (
    NUM_PROMPTS,
    FailingGrades,
    FakeServers,
    collected,
    issued_groups,
    log_probs_of,
    scores_of,
    trained,
    with_log_probs,
)
from tests.support.whole_runs import DELAY, ETA, NUM_REQUESTS, STEPS, check_run, config_of, run_whole, undisturbed

__all__ = ["undisturbed"]  # a fixture


@pytest.mark.parametrize("crash_at", range(NUM_REQUESTS))
def test_a_run_that_crashes_at_any_request_is_the_same_run(
    tmp_path: Path, undisturbed: FakeTrainer, crash_at: int
) -> None:
    config = config_of(tmp_path, "delay")
    trainer, totals = run_whole(config, [crash_at])
    check_run(config, trainer, totals)
    for step in range(STEPS):
        assert contents(trainer.trained[step]) == contents(undisturbed.trained[step])


@pytest.mark.parametrize("crash_at", range(2, NUM_REQUESTS, 3))
def test_a_bounded_run_that_crashes_keeps_its_bound(tmp_path: Path, crash_at: int) -> None:
    config = config_of(tmp_path, "bounded")
    check_run(config, *run_whole(config, [crash_at]))


@pytest.mark.parametrize("mode", ["delay", "bounded"])
def test_a_run_that_crashes_again_and_again_goes_on(tmp_path: Path, mode: str) -> None:
    config = config_of(tmp_path, mode, keep_steps=1)
    check_run(config, *run_whole(config, [5, 20, 0, 9]))


@pytest.mark.parametrize("mode", ["delay", "bounded"])
@pytest.mark.parametrize("crash_at", [6, 15])
def test_dynamic_sampling_goes_on_with_its_surplus_and_its_dropped_groups(
    tmp_path: Path, mode: str, crash_at: int
) -> None:
    config = config_of(tmp_path, mode, dynamic_sampling=True, over_sampling=2.0, keep_steps=1)
    trainer, totals = run_whole(config, [crash_at])
    check_run(config, trainer, totals)
    for batch in trainer.trained.values():
        assert all(len({response.reward for response in group.responses}) > 1 for group in batch.groups)
    assert totals.groups_dropped > 0
    if mode == "delay":
        assert totals.groups_issued == totals.groups_consumed + totals.groups_dropped


@pytest.mark.parametrize(
    ("changes", "servers"),
    [
        ({"dynamic_sampling": True, "over_sampling": 1.5}, FakeServers),
        ({}, partial(FailingGrades, lambda group_id: group_id % 5 == 1)),
    ],
    ids=["equal rewards", "not graded"],
)
@pytest.mark.parametrize("crashes_at", [[1], [6], [15], [21], [4, 9, 20]])
def test_what_replaces_dropped_groups_depends_neither_on_a_crash_nor_on_what_ends_first(
    tmp_path: Path, changes: dict, servers: Callable[..., FakeServers], crashes_at: list[int]
) -> None:
    found = []
    for name, crashes, longest in (("whole", [], 5), ("crashed", crashes_at, 7)):
        config = config_of(tmp_path / name, "delay", **changes)
        trainer, totals = run_whole(config, crashes, partial(servers, longest=longest))
        assert totals.groups_dropped > 0
        found.append([contents(trainer.trained[step]) for step in range(STEPS)])
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["delay", "bounded"])
@pytest.mark.parametrize("crash_at", [6, 15, 19])
def test_groups_that_could_not_be_graded_stay_dropped_after_a_crash(tmp_path: Path, mode: str, crash_at: int) -> None:
    def fails(group_id: int) -> bool:
        return group_id % 4 == 1

    config = config_of(tmp_path, mode, keep_steps=1)
    trainer, totals = run_whole(config, [crash_at], partial(FailingGrades, fails))
    check_run(config, trainer, totals)
    assert not any(fails(group.issued.group_id) for batch in trainer.trained.values() for group in batch.groups)
    assert 0 < totals.groups_not_graded <= totals.groups_dropped
    with closing(sqlite3.connect(config.run_dir / FILE_NAME)) as journal:
        missing = "SELECT DISTINCT group_id, state FROM groups JOIN responses USING (group_id) WHERE reward IS NULL"
        rows = journal.execute(missing).fetchall()
    assert {state for _, state in rows} == {"dropped"}
    assert all(fails(group_id) for group_id, _ in rows)
    assert len(rows) == totals.groups_not_graded


def test_what_was_scored_before_the_crash_comes_back_with_its_scores(tmp_path: Path) -> None:
    config = config_of(tmp_path, "delay", at_start=False)

    async def before() -> Batch:
        async with collecting(config, FakeServers()) as collector:
            batch = await collector.batch(1, 5)
            assert isinstance(batch, Batch)
            await collector.scored(scores_of(batch))
            return batch

    async def after() -> Batch:
        async with collecting(config, FakeServers()) as collector:
            batch = await collector.batch(1, 5)
            assert isinstance(batch, Batch)
            with pytest.raises(Conflict, match="scored already, and scores never change"):
                await collector.scored(scores_of(batch))
            return batch

    batch, found = asyncio.run(before()), asyncio.run(after())
    assert contents(found) == contents(batch)
    scores = [[response.behavior_log_probs for response in group.responses] for group in found.groups]
    for one, other in zip(scores, log_probs_of(batch.groups), strict=True):
        assert [array is not None and array.tolist() for array in one] == [array.tolist() for array in other]


def test_of_a_batch_that_is_scored_in_part_only_the_rest_is_scored(tmp_path: Path) -> None:
    """Bounded mode: the batch of a resumed run may be another one than that which was scored before."""
    config = config_of(tmp_path, "bounded")
    groups = [collected(group) for group in issued_groups(range(3), -1)]

    async def main() -> None:
        journal = await Journal.open(config.run_dir)
        await journal.issue([group.issued for group in groups])
        for group in groups:
            await journal.collect(group, True)
        await journal.score(0, with_log_probs(groups[:1]))
        await journal.close()
        async with collecting(config, FakeServers(exact=False), prompts=9) as collector:
            batch = await collector.batch(0, 5)
            assert isinstance(batch, Batch)
            assert [group.is_scored for group in batch.groups] == [True, False, False]
            scores = scores_of(batch, -1)
            for log_probs in scores.log_probs[0]:
                log_probs -= 1  # not what they were
            await collector.scored(scores)
            again = await collector.batch(0, 5)
            assert isinstance(again, Batch)
            assert all(group.is_scored for group in again.groups)
            kept = again.groups[0].responses[0].behavior_log_probs
            assert kept is not None
            assert kept.tolist() == log_probs_of(groups)[0][0].tolist()
            await collector.consumed(trained(0))

    asyncio.run(main())


async def crash_after_the_first_step(config: RunConfig) -> None:
    async with collecting(config, FakeServers()) as collector:
        with pytest.raises(Crash):
            await FakeTrainer(config).run(collector, crash_at=9)


def test_prompts_that_have_changed_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "delay")

    async def main() -> None:
        await crash_after_the_first_step(config)
        with pytest.raises(ValueError, match=r"data.train_file = unused: group \d+ had the prompt 'p\d', now it is"):
            async with collecting(config, FakeServers(), prompts=6):
                pass

    asyncio.run(main())


def test_a_checkpoint_without_its_journal_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(JournalError, match=r"version 2 has consumed 6 groups, the journal 0"):
            async with collecting(config_of(tmp_path, "delay"), FakeServers(), version=2):
                pass

    asyncio.run(main())


def test_a_trainer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "delay")

    async def main() -> None:
        async with collecting(config, FakeServers()) as collector:
            with pytest.raises(Conflict, match="resumes from version 2, the collector from 0"):
                collector.start(2)

    asyncio.run(main())


def test_a_finished_run_does_not_wait_for_batches_that_it_does_not_have(tmp_path: Path) -> None:
    """In delay mode versions STEPS - 2 and STEPS - 1 would have sampled the first batches of a longer run."""
    config = config_of(tmp_path, "delay")
    run_whole(config, [])

    async def goes_on() -> None:
        async with collecting(config, FakeServers(), version=STEPS, former_end=STEPS):
            pass

    asyncio.run(goes_on())


@pytest.mark.parametrize("crash_at", [None, 1, 3, 4, 6, 9, 13, 17])
@pytest.mark.parametrize("mode", ["delay", "bounded"])
def test_a_finished_run_is_made_longer_from_its_end(tmp_path: Path, mode: str, crash_at: int | None) -> None:
    """In delay mode the weights that should have sampled the next batches are gone: the last ones sample them."""
    config = config_of(tmp_path, mode)
    trainer, _ = run_whole(config, [])
    assert trainer.checkpoint == STEPS
    longer = config.model_copy(update={"num_global_steps": STEPS + 4})
    trainer._config = longer

    async def goes_on(crash_at: int | None) -> CollectorTotals:
        former_end = STEPS if trainer.checkpoint == STEPS else STEPS + 4
        servers = FakeServers(exact=mode == "delay")
        async with collecting(longer, servers, trainer.checkpoint or 0, former_end=former_end) as collector:
            return await trainer.run(collector, crash_at)

    if crash_at is not None:
        with pytest.raises(Crash):
            asyncio.run(goes_on(crash_at))
    totals = asyncio.run(goes_on(None))
    assert totals.groups_consumed == (STEPS + 4) * NUM_PROMPTS
    found = [
        {step - group.oldest_version for group in trainer.trained[step].groups} for step in range(STEPS, STEPS + 4)
    ]
    if mode == "delay":
        assert found == [{0}, {1}, {2}, {2}]
    else:
        assert all(0 <= value <= ETA for values in found for value in values)


def test_a_run_that_ends_early_enough_in_its_checkpoints_can_be_made_longer(tmp_path: Path) -> None:
    config = config_of(tmp_path, "delay")
    trainer, _ = run_whole(config, [])
    trainer.checkpoint = STEPS - DELAY
    longer = config.model_copy(update={"num_global_steps": STEPS + 3})
    trainer._config = longer

    async def goes_on() -> CollectorTotals:
        async with collecting(longer, FakeServers(), version=STEPS - DELAY) as collector:
            return await trainer.run(collector)

    totals = asyncio.run(goes_on())
    assert totals.groups_consumed == (STEPS + 3) * NUM_PROMPTS
    assert {step - min(group.oldest_version for group in trainer.trained[step].groups) for step in range(2, 7)} == {2}


def kept_steps(config: RunConfig) -> list[int]:
    """The global steps whose tokens the journal still has."""
    with closing(sqlite3.connect(config.run_dir / FILE_NAME)) as journal:
        query = (
            "SELECT DISTINCT consumed_step FROM groups JOIN responses USING (group_id)"
            " WHERE token_ids IS NOT NULL AND consumed_step IS NOT NULL ORDER BY 1"
        )
        return [step for (step,) in journal.execute(query)]


@pytest.mark.parametrize("override", ["checkpoint.every_steps=0", "debug.trainer=timer"])
@pytest.mark.parametrize(("keep_steps", "kept"), [(1, [3]), (2, [2, 3]), (0, [0, 1, 2, 3])])
def test_a_journal_without_checkpoints_forgets_as_well(
    tmp_path: Path, override: str, keep_steps: int, kept: list[int]
) -> None:
    config = with_overrides(config_of(tmp_path, "delay", keep_steps=keep_steps), [override])
    trainer = FakeTrainer(config, checkpoint_every=99)

    async def main() -> None:
        async with collecting(config, FakeServers(2)) as collector:
            await trainer.run(collector)
            if collector._retention.pruning is not None:
                await collector._retention.pruning

    asyncio.run(main())
    assert kept_steps(config) == kept


@pytest.mark.parametrize("changes", [[], ["checkpoint.every_steps=0", "checkpoint.every_minutes=30"]])
def test_with_checkpoints_only_what_they_include_is_forgotten(tmp_path: Path, changes: list[str]) -> None:
    """None is written yet: all that steps have consumed is still needed, however old it is."""
    config = with_overrides(config_of(tmp_path, "delay", keep_steps=1), changes)

    async def main() -> None:
        async with collecting(config, FakeServers(2)) as collector:
            await FakeTrainer(config, checkpoint_every=99).run(collector)
            assert collector._retention.pruning is None

    asyncio.run(main())
    assert kept_steps(config) == [0, 1, 2, 3]


@pytest.mark.parametrize("crash_at", range(10, NUM_REQUESTS - 4, 3))
@pytest.mark.parametrize("mode", ["delay", "bounded"])
def test_a_run_that_lost_its_state_without_checkpoints_starts_again(
    tmp_path: Path, undisturbed: FakeTrainer, mode: str, crash_at: int
) -> None:
    """In delay mode it is the same run: what is missing is sampled again, by the weights that sampled it before."""
    config = with_overrides(config_of(tmp_path, mode, keep_steps=1), ["checkpoint.every_steps=0"])
    trainer = FakeTrainer(config, checkpoint_every=99)

    async def incarnation(crash_at: int | None) -> CollectorTotals:
        async with collecting(config, FakeServers(2, exact=mode == "delay")) as collector:
            return await trainer.run(collector, crash_at)

    with pytest.raises(Crash):
        asyncio.run(incarnation(crash_at))
    check_run(config, trainer, asyncio.run(incarnation(None)))
    if mode == "delay":
        for step in range(STEPS):
            assert contents(trainer.trained[step]) == contents(undisturbed.trained[step])


def test_a_checkpoint_of_earlier_settings_keeps_what_it_needs(tmp_path: Path) -> None:
    """Checkpoints were switched off when the run was launched again: it still goes on from the last one."""
    config = config_of(tmp_path, "delay", keep_steps=1)
    trainer = FakeTrainer(config)

    async def incarnation(config: RunConfig, crash_at: int | None) -> CollectorTotals:
        async with collecting(config, FakeServers(2), trainer.checkpoint or 0) as collector:
            return await trainer.run(collector, crash_at)

    with pytest.raises(Crash):
        asyncio.run(incarnation(config, 19))
    assert trainer.checkpoint == 2
    trainer._every = 99
    without = with_overrides(config, ["checkpoint.every_steps=0"])
    with pytest.raises(Crash):
        asyncio.run(incarnation(without, 11))
    assert kept_steps(without) == [2, 3]
    check_run(without, trainer, asyncio.run(incarnation(without, None)))
