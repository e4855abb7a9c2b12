"""Scans equal loops over the tokens, whatever the lengths and holes."""

import math

import numpy as np
import pytest
import torch

from minpro_megatron.objective.across_ranks.scan import IDENTITY, Operator, Runs, WholeSequenceScan

COMBINE = {"min": min, "sum": math.fsum}


def ragged(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, mask, sequence) of 1 to 8 sequences of 1 to 12 tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 13, random.integers(1, 9))
    total = int(lengths.sum())
    sequence = np.repeat(random.permutation(100)[: len(lengths)], lengths)  # names need not be in order
    mask = (random.random(total) > 0.4).astype(np.float64)
    return torch.tensor(random.normal(0, 3, total)), torch.tensor(mask), torch.tensor(sequence)


def reduce_where(values: torch.Tensor, chosen: list[int], operator: Operator) -> float:
    return COMBINE[operator](values[chosen].tolist()) if chosen else IDENTITY[operator]


@pytest.mark.parametrize("operator", IDENTITY)
@pytest.mark.parametrize("seed", range(10))
def test_scans_equal_loops(seed: int, operator: Operator) -> None:
    values, mask, sequence = ragged(seed)
    scan = WholeSequenceScan(sequence, mask)
    members = [
        [other for other in range(len(values)) if sequence[other] == sequence[place] and mask[other]]
        for place in range(len(values))
    ]
    earlier = [[other for other in of if other < place] for place, of in enumerate(members)]
    up_to_here = [[other for other in of if other <= place] for place, of in enumerate(members)]
    for found, chosen in (
        (scan.exclusive(values, operator), earlier),
        (scan.inclusive(values, operator), up_to_here),
        (scan.whole(values, operator), members),
    ):
        expected = [reduce_where(values, of, operator) for of in chosen]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("operator", IDENTITY)
def test_the_first_token_gets_the_identity_and_one_token_is_a_sequence(operator: Operator) -> None:
    scan = WholeSequenceScan(torch.tensor([4, 2, 2]), torch.ones(3))
    found = scan.exclusive(torch.tensor([7.0, -1.0, 5.0]), operator)
    assert found.tolist() == [IDENTITY[operator], IDENTITY[operator], -1.0]


def test_masked_values_are_never_seen() -> None:
    scan = WholeSequenceScan(torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 0.0, 1.0]))
    values = torch.tensor([2.0, float("nan"), 3.0])
    assert scan.exclusive(values, "min").tolist() == [math.inf, 2.0, 2.0]
    assert scan.whole(values, "sum").tolist() == [5.0, 5.0, 5.0]


@pytest.mark.parametrize("operator", IDENTITY)
@pytest.mark.parametrize("seed", range(10))
def test_totals_go_to_the_key_of_their_run_and_are_the_identity_elsewhere(seed: int, operator: Operator) -> None:
    random = np.random.default_rng(seed)
    keys = np.sort(random.permutation(20)[:7])
    key = torch.tensor(np.repeat(keys, random.integers(1, 9, 7)))
    values = torch.tensor(random.normal(0, 3, len(key)))
    runs = Runs.of(key)
    found = runs.totals(runs.running(values, operator), 20, operator)
    expected = [reduce_where(values, torch.where(key == name)[0].tolist(), operator) for name in range(20)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_sums_are_accumulated_in_float64() -> None:
    count = 20_000
    scan = WholeSequenceScan(torch.zeros(count, dtype=torch.int64), torch.ones(count))
    found = scan.inclusive(torch.full((count,), 0.1), "sum")
    assert found.dtype == torch.float64
    assert float(found[-1]) == pytest.approx(count * float(np.float32(0.1)), rel=1e-12)
    assert scan.inclusive(torch.full((count,), 0.1), "min").dtype == torch.float32


@pytest.mark.parametrize("operator", IDENTITY)
def test_a_bound_on_the_length_of_runs_saves_passes_and_changes_nothing(operator: Operator) -> None:
    key = torch.tensor([3] * 5 + [1] + [2] * 4)
    values = torch.linspace(-2, 2, 10, dtype=torch.float64)
    assert torch.equal(Runs.of(key, longest=5).running(values, operator), Runs.of(key).running(values, operator))
    assert not torch.equal(Runs.of(key, longest=2).running(values, "sum"), Runs.of(key).running(values, "sum"))
