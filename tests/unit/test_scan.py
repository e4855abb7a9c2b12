"""Scans equal loops over the tokens, whatever the lengths and holes."""

import math

import numpy as np
import pytest
import torch

from minpro_megatron.objective.scan import IDENTITY, PieceBlock, WholeSequenceScan, exclusive_of

COMBINE = {"min": min, "sum": math.fsum}


def ragged(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, mask, sequence) of 1 to 8 sequences of 1 to 12 tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 13, random.integers(1, 9))
    total = int(lengths.sum())
    sequence = np.repeat(random.permutation(100)[: len(lengths)], lengths)  # names need not be in order
    mask = (random.random(total) > 0.4).astype(np.float64)
    return torch.tensor(random.normal(0, 3, total)), torch.tensor(mask), torch.tensor(sequence)


def reduce_where(values: torch.Tensor, chosen: list[int], operator: str) -> float:
    return COMBINE[operator](values[chosen].tolist()) if chosen else IDENTITY[operator]


@pytest.mark.parametrize("operator", IDENTITY)
@pytest.mark.parametrize("seed", range(10))
def test_exclusive_and_whole_equal_loops(seed: int, operator: str) -> None:
    values, mask, sequence = ragged(seed)
    scan = WholeSequenceScan(sequence, mask)
    members = [
        [other for other in range(len(values)) if sequence[other] == sequence[place] and mask[other]]
        for place in range(len(values))
    ]
    earlier = [[other for other in of if other < place] for place, of in enumerate(members)]
    for found, chosen in ((scan.exclusive(values, operator), earlier), (scan.whole(values, operator), members)):
        expected = [reduce_where(values, of, operator) for of in chosen]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("operator", IDENTITY)
def test_the_first_token_gets_the_identity_and_one_token_is_a_sequence(operator: str) -> None:
    scan = WholeSequenceScan(torch.tensor([4, 2, 2]), torch.ones(3))
    found = scan.exclusive(torch.tensor([7.0, -1.0, 5.0]), operator)
    assert found.tolist() == [IDENTITY[operator], IDENTITY[operator], -1.0]


def test_masked_values_are_never_seen() -> None:
    scan = WholeSequenceScan(torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 0.0, 1.0]))
    values = torch.tensor([2.0, float("nan"), 3.0])
    assert scan.exclusive(values, "min").tolist() == [math.inf, 2.0, 2.0]
    assert scan.whole(values, "sum").tolist() == [5.0, 5.0, 5.0]


@pytest.mark.parametrize("seed", range(10))
def test_pieces_are_the_runs_of_equal_neighbours(seed: int) -> None:
    key = torch.tensor(np.random.default_rng(seed).integers(0, 3, 40))
    block = PieceBlock.of_runs(key)
    runs: list[list[int]] = []
    for slot, value in enumerate(key.tolist()):
        if slot and value == key[slot - 1]:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    found = [row[valid].tolist() for row, valid in zip(block.index, block.valid, strict=True)]
    assert found == runs
    assert block.valid.shape[1] == max(map(len, runs))


@pytest.mark.parametrize("seed", range(5))
def test_a_block_gives_back_what_was_laid_out_and_pads_with_the_identity(seed: int) -> None:
    values, _, sequence = ragged(seed)
    block = PieceBlock.of_runs(sequence)
    laid_out = block.lay_out(values, -7.5)
    assert torch.equal(block.pick(laid_out), values)
    assert (laid_out[~block.valid] == -7.5).all()
    assert int(block.valid.sum()) == len(values)


@pytest.mark.parametrize("dim", [0, 1])
def test_exclusive_of_shifts_by_one_along_its_dimension(dim: int) -> None:
    values = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 6.0]])
    rows = values if dim == 1 else values.t()
    for operator, combine in COMBINE.items():
        found = exclusive_of(rows.t() if dim == 0 else rows, operator, dim)
        found = found if dim == 1 else found.t()
        for row, of in zip(rows.tolist(), found.tolist(), strict=True):
            expected = [combine(row[:i]) if i else IDENTITY[operator] for i in range(len(row))]
            assert of == expected
