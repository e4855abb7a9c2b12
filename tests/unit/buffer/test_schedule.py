"""Properties of whole runs over thousands of random schedules, and each schedule's answers one by one.

`tests/support/simulated_run.py` asserts the properties: the bound holds (delay mode: exactly min(k, n)), nothing is
trained twice, no group is lost, every run ends.
"""

import random
from collections.abc import Callable, Iterable, Mapping

import pytest

from minpro_megatron.buffer import journal, schedule
from minpro_megatron.buffer.journal_restore import roll_back
from minpro_megatron.buffer.schedule import (
    MAX_DROPPED_FACTOR,
    BoundedSchedule,
    DelaySchedule,
    Restored,
    ScheduleError,
    Slot,
    make_schedule,
)
from minpro_megatron.buffer.staleness import RUN_START, Beginning, admissible_groups, may_take_batch
from minpro_megatron.config.run import RunConfig
from tests.support.simulated_run import BASE, SimulatedRun, simulate


def runs(mode: str, count: int, *, journal: bool = False) -> list[SimulatedRun]:
    return [SimulatedRun(random.Random(seed), mode, journal=journal) for seed in range(count)]


@pytest.mark.parametrize("mode", ["delay", "bounded"])
def test_any_run_keeps_its_bound_and_every_group(mode: str) -> None:
    simulate(runs(mode, 1500))


@pytest.mark.parametrize("mode", ["delay", "bounded"])
@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.long)])
def test_a_run_that_crashes_keeps_its_bound_and_every_group(mode: str, count: int) -> None:
    made = runs(mode, count, journal=True)
    simulate(made)
    assert sum(run.num_incarnations for run in made) > 1.7 * count


def naive_may_take_batch(
    step: int, max_staleness: int, num_prompts: int, ready: Mapping[int, int], in_flight: Mapping[int, int]
) -> bool:
    """Waits only for groups that are too old for the next step, as if any number of them fitted into it."""
    return sum(ready.values()) >= num_prompts and all(version > step - max_staleness for version in in_flight)


def generous_admission(version: int, max_staleness: int, num_steps: int, num_prompts: int, existing: int) -> int:
    return admissible_groups(version, max_staleness, num_steps, num_prompts, existing - 1)


def early_batches(version: int, delay: int, num_steps: int, beginnings: Iterable[Beginning]) -> range:
    """Samples the next version's batch as well."""
    return range(min(version and version + delay, num_steps), min(version + delay + 2, num_steps))


def forgetful_roll_back(connection, *arguments: object) -> list[str]:
    """Keeps what later weights have sampled."""
    damaged = roll_back(connection, *arguments)  # type: ignore[arg-type]
    connection.execute("UPDATE groups SET consumed_step = NULL WHERE state = 'scored'")
    connection.execute("DELETE FROM groups WHERE state = 'issued'")
    return damaged


@pytest.mark.parametrize(
    ("mode", "crashes", "owner", "name", "wrong"),
    [
        ("bounded", False, schedule, "may_take_batch", naive_may_take_batch),
        ("bounded", False, schedule, "admissible_groups", generous_admission),
        ("delay", False, schedule, "batches_of_version", early_batches),
        ("delay", True, journal, "roll_back", forgetful_roll_back),
        ("bounded", True, journal, "roll_back", forgetful_roll_back),
    ],
)
def test_the_simulation_notices_a_wrong_rule(
    monkeypatch: pytest.MonkeyPatch, mode: str, crashes: bool, owner: object, name: str, wrong: Callable
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match="run "):
        simulate(runs(mode, 200, journal=crashes))


def config(mode: str, *, prompts: int = 2, steps: int = 10, **changes: object) -> RunConfig:
    """`changes` go to the sections batch and staleness, whichever has the name."""
    batch = {name: value for name, value in changes.items() if name in type(BASE.batch).model_fields}
    staleness = {name: value for name, value in changes.items() if name not in batch}
    return BASE.model_copy(
        update={
            "num_global_steps": steps,
            "batch": BASE.batch.model_copy(update={"num_prompts": prompts, **batch}),
            "staleness": BASE.staleness.model_copy(update={"mode": mode, **staleness}),
        }
    )


def test_no_group_is_given_up_for_being_long() -> None:
    """Of the groups that were issued early enough to be due by the end, all are trained, long and short."""
    made = []
    for seed in range(100):
        settings = config("bounded", prompts=1 + seed % 3, steps=8, max_staleness=1 + seed % 4)
        made.append(SimulatedRun(random.Random(seed), "bounded", faults=False, config=settings))
    simulate(made)
    due = []
    for run in made:
        trained = {group_id for step in run.trained for group_id in step}
        last_due = run.config.num_global_steps - 1 - run.config.staleness.max_staleness
        issued_at = run.issued_at.items()
        due.extend((run.lengths[id_], id_ in trained) for id_, version in issued_at if version <= last_due)
    due.sort()
    short, long = due[: len(due) // 2], due[len(due) // 2 :]
    assert long[-1][0] > 500 * short[0][0]
    assert [sum(not trained for _, trained in half) for half in (short, long)] == [0, 0]


def ids(slots: Iterable[Slot]) -> list[int]:
    return [slot.group_id for slot in slots]


def test_delay_mode_issues_the_batches_of_a_version_and_waits_for_them() -> None:
    made = make_schedule(config("delay", delay_steps=1))
    assert made.to_issue() == [Slot(0, 0, 0), Slot(1, 0, 0), Slot(2, 1, 0), Slot(3, 1, 0)]
    assert made.to_issue() == []
    for group_id in (3, 0):
        made.collected(group_id, True)
    assert made.batch(0) is None
    made.collected(1, True)
    assert made.batch(0) == ([0, 1], [])
    assert made.batch(0) == ([0, 1], [])
    made.consumed(0)
    assert made.to_issue() == []  # what is consumed is not wanted again
    assert not made.may_publish()
    assert (made.is_sampled_by_now(1), made.is_sampled_by_now(2)) == (True, False)
    made.collected(2, True)
    assert made.may_publish()
    made.published()
    assert made.to_issue() == [Slot(4, 2, 1), Slot(5, 2, 1)]


def test_a_filter_in_delay_mode_issues_wave_after_wave_and_counts_the_surplus() -> None:
    made = make_schedule(config("delay", delay_steps=0, prompts=3, dynamic_sampling=True, over_sampling=1.5))
    assert ids(made.to_issue()) == [0, 1, 2, 3, 4]  # ceil(3 x 1.5)
    for group_id, accepted in ((1, True), (4, False), (0, False), (3, False)):
        made.collected(group_id, accepted)
    assert made.to_issue() == []  # the wave has not ended
    made.collected(2, True)
    assert made.batch(0) is None
    assert ids(made.to_issue()) == [5, 6]
    made.collected(6, True)
    assert made.batch(0) is None
    assert not made.may_publish()
    made.collected(5, True)
    assert made.batch(0) == ([1, 2, 5], [6])


def test_dropped_groups_of_several_batches_are_replaced_in_the_order_of_the_batches() -> None:
    """Whichever of them ends first: a run that goes on after a crash then has the same prompts again."""
    for order in (range(4), range(3, -1, -1)):
        made = make_schedule(config("delay", delay_steps=1))
        issued = made.to_issue()
        for group_id in order:
            assert made.to_issue() == []
            made.collected(group_id, accepted=group_id not in (1, 3))
        assert issued == [Slot(0, 0, 0), Slot(1, 0, 0), Slot(2, 1, 0), Slot(3, 1, 0)]
        assert made.to_issue() == [Slot(4, 0, 0), Slot(5, 1, 0)]


def test_without_a_filter_nothing_is_over_sampled() -> None:
    assert len(make_schedule(config("delay", delay_steps=0, prompts=3, over_sampling=4.0)).to_issue()) == 3


@pytest.mark.parametrize("mode", ["delay", "bounded"])
def test_a_hopeless_filter_ends_the_run(mode: str) -> None:
    made = make_schedule(config(mode, dynamic_sampling=True, delay_steps=0))
    under_way = ids(made.to_issue())
    for _ in range(MAX_DROPPED_FACTOR * 2):
        made.collected(under_way.pop(0), False)
        under_way += ids(made.to_issue())
    with pytest.raises(ScheduleError, match=r"41 groups were dropped .*batch.num_prompts = 2, .*to false"):
        made.collected(under_way[0], False)


def test_bounded_mode_admits_by_version_and_a_dropped_group_gives_its_place_back() -> None:
    made = make_schedule(config("bounded", max_staleness=1))
    assert made.to_issue() == [Slot(group_id, -1, 0) for group_id in range(4)]
    made.collected(0, False)
    assert ids(made.to_issue()) == [4]
    for group_id in (1, 2):
        made.collected(group_id, True)
    assert made.to_issue() == []
    assert made.batch(1) is None
    assert made.batch(0) == ([1, 2], [])
    made.consumed(0)
    assert made.to_issue() == []  # a place is not free before the version that makes it one
    made.published()
    assert made.to_issue() == [Slot(5, -1, 1), Slot(6, -1, 1)]


def test_bounded_mode_issues_no_more_than_the_run_consumes() -> None:
    made = make_schedule(config("bounded", max_staleness=4, steps=3))
    assert ids(made.to_issue()) == list(range(6))


def test_a_chosen_batch_stays_the_same_when_an_older_group_ends_later() -> None:
    made = make_schedule(config("bounded", prompts=1, max_staleness=2))
    made.to_issue()
    made.collected(2, True)
    assert made.batch(0) == ([2], [])
    made.collected(0, True)
    assert made.batch(0) == ([2], [])


def test_a_batch_waits_where_the_next_steps_could_not_take_all_old_groups() -> None:
    """Three groups of version 0 and one a step: a rule that looks at single groups would let 3 pass both 0 and 1,
    and then 1 be consumed at step 3 with staleness 3."""
    made = make_schedule(config("bounded", prompts=1, max_staleness=2))
    made.to_issue()
    made.collected(2, True)
    made.batch(0)
    made.consumed(0)
    made.published()
    assert made.to_issue() == [Slot(3, -1, 1)]
    made.collected(3, True)
    assert made.batch(1) is None
    made.collected(1, True)
    assert made.batch(1) == ([1], [])
    arguments = (1, 2, 1, {1: 1}, {0: 2})
    assert naive_may_take_batch(*arguments)
    assert not may_take_batch(*arguments)


def test_restored_groups_are_ready_or_repeated_and_ids_go_on() -> None:
    restored = [
        Restored(Slot(4, 2, 1), ready=True),
        Restored(Slot(5, 2, 1), ready=True),
        Restored(Slot(6, 3, 2), ready=False),
        Restored(Slot(7, 3, 2), ready=True),
    ]
    made = DelaySchedule(config("delay", delay_steps=1), 2, restored, 8)
    assert made.batch(2) == ([4, 5], [])
    assert made.to_issue() == [Slot(6, 3, 2)]
    made.collected(6, True)
    assert made.batch(3) == ([6, 7], [])
    assert made.to_issue() == []
    made.consumed(2)
    made.published()
    assert ids(made.to_issue()) == [8, 9]

    bounded = [Restored(Slot(4, -1, 1), ready=False), *restored[1:2], Restored(Slot(6, -1, 2), False, dropped=True)]
    other = BoundedSchedule(config("bounded", max_staleness=1), 2, bounded, 8)
    # 4 consumed, 1 ready, 1 to repeat with the current weights: 8 - 6 are free
    assert other.to_issue() == [Slot(4, -1, 2), Slot(8, -1, 2), Slot(9, -1, 2)]


def test_a_repeated_group_is_as_young_as_the_current_weights() -> None:
    """Group 4 was issued at version 1 and is sampled again at version 2: no batch has to wait for it."""
    restored = [Restored(Slot(4, -1, 1), ready=False), Restored(Slot(5, -1, 2), ready=True)]
    made = BoundedSchedule(config("bounded", prompts=1, max_staleness=1), 2, restored, 6)
    assert made.batch(2) == ([5], [])


@pytest.mark.parametrize("num_ready", [0, 1])
def test_a_batch_of_weights_that_are_gone_must_be_there(num_ready: int) -> None:
    """Batch 5 was sampled with version 4 before the checkpoint of version 5, and the journal has lost it."""
    restored = [Restored(Slot(group_id, 5, 4), ready=True) for group_id in range(num_ready)]
    with pytest.raises(ScheduleError, match=r"batch 5, which version 4 was to sample, .*older than the checkpoint"):
        DelaySchedule(config("delay", delay_steps=1), 5, restored, 20)
    DelaySchedule(config("delay", delay_steps=1, steps=5), 5, [], 20)


def test_a_run_that_is_made_longer_begins_again_like_a_run() -> None:
    """Its 5 steps are complete: version 5 samples batches 5 to 7, as version 0 did with batches 0 to 2."""
    made = DelaySchedule(config("delay", prompts=1, delay_steps=2), 5, [], 5, (RUN_START, Beginning(5, 5)))
    assert made.to_issue() == [Slot(5, 5, 5), Slot(6, 6, 5), Slot(7, 7, 5)]
    assert (made.is_sampled_by_now(7), made.is_sampled_by_now(8)) == (True, False)
    for group_id in (5, 6, 7):
        assert not made.may_publish()
        made.collected(group_id, True)
    made.consumed(5)
    assert made.may_publish()
    made.published()
    assert made.to_issue() == [Slot(8, 8, 6)]
