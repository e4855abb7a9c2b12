"""The arithmetic of staleness: delay mode against a simulation that knows no formula, bounded mode by its two rules."""

import itertools
import random
from collections import Counter

import pytest

from minpro_megatron.buffer.staleness import (
    IssuedAt,
    admissible_groups,
    batches_of_version,
    evaluated_versions,
    expected_staleness,
    may_take_batch,
    sampling_version,
    staleness,
)


def simulate(delay: int, num_steps: int) -> dict[int, int]:
    """batch -> version that samples it: a sampler that may run `delay` batches ahead of the trainer."""
    sampled: dict[int, int] = {}
    next_batch = 0
    for version in range(num_steps + 1):  # version v exists once v steps are complete
        while next_batch <= version + delay and next_batch < num_steps:
            sampled[next_batch] = version
            next_batch += 1
    return sampled


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 9])
def test_versions_and_batches_are_those_of_the_simulation(delay: int, num_steps: int) -> None:
    sampled = simulate(delay, num_steps)
    assert {batch: sampling_version(batch, delay) for batch in range(num_steps)} == sampled
    for version in range(num_steps + 1):
        expected = [batch for batch, by in sampled.items() if by == version]
        assert list(batches_of_version(version, delay, num_steps)) == expected


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
def test_staleness_grows_to_the_delay_and_stays(delay: int) -> None:
    # At step k the trainer holds version k.
    found = [staleness(step, sampling_version(step, delay)) for step in range(12)]
    assert found == [expected_staleness(step, delay) for step in range(12)]
    assert found == [*range(delay), *[delay] * (12 - delay)]


@pytest.mark.parametrize(
    ("num_steps", "every", "expected"),
    [(5, 0, [0, 5]), (5, 2, [0, 2, 4, 5]), (4, 2, [0, 2, 4]), (1, 1, [0, 1]), (3, 10, [0, 3])],
)
def test_first_last_and_multiples_are_evaluated(num_steps: int, every: int, expected: list[int]) -> None:
    assert evaluated_versions(num_steps, every) == expected


@pytest.mark.parametrize(
    ("version", "existing", "expected"),
    [(0, 0, 12), (0, 12, 0), (1, 12, 4), (0, 13, 0), (3, 4, 20), (4, 20, 4), (9, 24, 0)],
)
def test_a_bounded_run_admits_so_many_groups(version: int, existing: int, expected: int) -> None:
    """At version v: (eta + v + 1) batches of 4 in all, with eta = 2; never more than the run's 6 batches."""
    assert admissible_groups(version, 2, 6, 4, existing) == expected


def too_late(step: int, eta: int, num_prompts: int, left: list[IssuedAt]) -> bool:
    """Whether some version's groups are more than the steps that may still consume them have places for, step + 1
    being the next: rule 2, counted version by version."""
    return any(
        sum(group.version <= version for group in left) > max(0, version + eta - step) * num_prompts
        for version in range(-eta, step + 1)
    )


def test_a_batch_is_taken_exactly_when_all_that_stay_can_be_consumed_in_time() -> None:
    rng = random.Random(0)
    outcomes = set()
    for _ in range(2000):
        step, eta, num_prompts = rng.randint(0, 5), rng.randint(1, 3), rng.randint(1, 3)
        groups = [
            IssuedAt(max(0, step - rng.randint(0, eta)), group_id)
            for group_id in rng.sample(range(40), rng.randint(0, (eta + 1) * num_prompts))
        ]
        ready = [group for group in groups if rng.random() < 0.7]
        in_flight = [group for group in groups if group not in ready]
        may_take = may_take_batch(step, eta, num_prompts, counts(ready), counts(in_flight))
        first = sorted(ready)[:num_prompts]
        left = [group for group in groups if group not in first]
        assert may_take == (len(first) == num_prompts and not too_late(step, eta, num_prompts, left))
        outcomes.add((may_take, num_prompts))
    assert outcomes == set(itertools.product((True, False), (1, 2, 3)))


def counts(groups: list[IssuedAt]) -> Counter[int]:
    return Counter(group.version for group in groups)
