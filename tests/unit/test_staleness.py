"""Delay mode's arithmetic against a simulation that knows no formula."""

import pytest

from minpro_megatron.rollout.staleness import (
    batches_of_version,
    evaluated_versions,
    expected_staleness,
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
