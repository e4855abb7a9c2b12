"""The order of a run: whatever the delay and the first step, every batch is fetched once and early enough."""

from itertools import product

import pytest

from minpro_megatron.buffer.staleness import sampling_version
from minpro_megatron.buffer.step_order import Fetch, Publish, Release, Save, StepOrder, Train

CASES = [(n, ahead, first) for n, ahead, first in product(range(6), range(5), range(6)) if first <= n]


def events_of(order: StepOrder) -> list:
    return [*order.before_first_step(), *(event for step in order.steps for event in order.of_step(step))]


@pytest.mark.parametrize(("num_steps", "ahead", "first"), CASES)
def test_every_batch_is_fetched_once_and_before_it_is_trained_on(num_steps: int, ahead: int, first: int) -> None:
    events = events_of(StepOrder(num_steps, ahead, first))
    left = list(range(first, num_steps))
    assert [event.batch for event in events if isinstance(event, Fetch)] == left
    assert [event.step for event in events if isinstance(event, Train)] == left
    for kind in (Publish, Save):
        assert [event.version for event in events if isinstance(event, kind)] == [step + 1 for step in left]
    for step in left:
        fetched = next(i for i, event in enumerate(events) if isinstance(event, Fetch) and event.batch == step)
        trained, published, saved = (events.index(event) for event in (Train(step), Publish(step + 1), Save(step + 1)))
        assert fetched < trained < published < saved


@pytest.mark.parametrize(("num_steps", "ahead", "first"), [case for case in CASES if case[2] == 0])
def test_a_batch_is_scored_with_the_version_that_sampled_it(num_steps: int, ahead: int, first: int) -> None:
    """And the servers hold the next version already, if there is one: they sample while the batch is scored."""
    published = trained = 0
    for event in events_of(StepOrder(num_steps, ahead, first)):
        if isinstance(event, Publish):
            published = event.version
        if isinstance(event, Train):
            trained = event.step + 1
        if isinstance(event, Fetch):
            assert event.version == sampling_version(event.batch, ahead)
            assert published == trained == min(event.version + 1, trained)
            assert trained - event.version <= 1  # the trainer keeps the last version before the current one


@pytest.mark.parametrize(("num_steps", "ahead", "first"), [case for case in CASES if case[1]])
def test_a_checkpoint_comes_after_the_scores_that_its_weights_cannot_compute(
    num_steps: int, ahead: int, first: int
) -> None:
    fetched: set[int] = set()
    for event in events_of(StepOrder(num_steps, ahead, first)):
        if isinstance(event, Fetch):
            fetched.add(event.batch)
        if isinstance(event, Save):
            assert fetched >= set(range(first, min(event.version + ahead, num_steps)))


@pytest.mark.parametrize(("num_steps", "ahead", "first"), CASES)
def test_in_turns_each_step_does_the_same_and_the_servers_never_hold_memory_while_it_trains(
    num_steps: int, ahead: int, first: int
) -> None:
    apart = events_of(StepOrder(num_steps, ahead, first))
    events = events_of(StepOrder(num_steps, ahead, first, in_turns=True))
    released = False
    for event in events:
        match event:
            case Release(version):
                assert not released
                assert version == sum(isinstance(one, Train) for one in events[: events.index(event)]) + first
                released = True
            case Publish():
                assert released
                released = False
            case _:
                assert released
    assert not released  # the last version is evaluated
    assert {event for event in events if not isinstance(event, Release)} == set(apart)
    assert len(events) == len(apart) + num_steps - first


@pytest.mark.parametrize(("num_steps", "ahead", "first"), CASES)
def test_in_turns_a_batch_is_scored_with_the_weights_in_place_and_before_they_change(
    num_steps: int, ahead: int, first: int
) -> None:
    in_place, fetched = first, set()
    for event in events_of(StepOrder(num_steps, ahead, first, in_turns=True)):
        match event:
            case Fetch(batch, version):
                assert version == in_place
                assert first > 0 or version == sampling_version(batch, ahead)
                fetched.add(batch)
            case Train(step):
                assert fetched >= {step, *range(first, min(step + ahead + 1, num_steps))}
                in_place = step + 1
            case Save(version) | Publish(version):
                assert version == in_place
