"""pass@k against exact values and against counting every subset."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from minpro_megatron.evaluation.pass_at_k import mean_pass_at_k, pass_at_k, pass_at_k_values


@pytest.mark.parametrize(("k", "expected"), [(1, 0.0390625), (2, 0.0768947), (8, 0.2796590), (64, 0.9711811)])
def test_exact_values(k: int, expected: float) -> None:
    assert pass_at_k(128, 5, k) == pytest.approx(expected, abs=5e-8)
    # The product form of C(n - c, k) / C(n, k), in rational numbers.
    all_wrong = math.prod(Fraction(128 - k - place, 128 - place) for place in range(5))
    assert pass_at_k(128, 5, k) == pytest.approx(float(1 - all_wrong), abs=1e-15)


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_it_is_the_share_of_subsets_with_a_right_sample(num_correct: int, k: int) -> None:
    subsets = list(combinations([True] * num_correct + [False] * (6 - num_correct), k))
    share = sum(map(any, subsets)) / len(subsets)
    assert pass_at_k(6, num_correct, k) == pytest.approx(share, abs=1e-15)


def test_all_samples_is_whether_any_is_right() -> None:
    assert [pass_at_k(1000, count, 1000) for count in (0, 1, 1000)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("num_correct", "k"), [(-1, 1), (5, 1), (2, 0), (2, 5)])
def test_impossible_counts_are_refused(num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="num_correct"):
        pass_at_k(4, num_correct, k)


def test_standard_error_is_clustered_by_prompt() -> None:
    # Two prompts always right, two always wrong: 4 independent observations, however many samples each has.
    result = mean_pass_at_k(100, [100, 0, 100, 0], k=1)
    assert result.mean == 0.5
    assert result.standard_error == pytest.approx(math.sqrt((4 * 0.25 / 3) / 4))


def test_one_prompt_has_no_standard_error_and_none_is_refused() -> None:
    assert mean_pass_at_k(4, [2], k=1).standard_error == 0.0
    with pytest.raises(ValueError, match="num_correct is empty"):
        mean_pass_at_k(4, [], k=1)


def test_all_k_at_once_are_the_exact_values() -> None:
    counts = [0, 1, 5, 64, 123, 127, 128]
    values = pass_at_k_values(128, counts, 128)
    assert values.shape == (7, 128)
    for row, count in zip(values, counts, strict=True):
        exact = [1 - Fraction(math.comb(128 - count, k), math.comb(128, k)) for k in range(1, 129)]
        np.testing.assert_allclose(row, [float(value) for value in exact], rtol=0, atol=1e-14)
    assert (values[0] == 0).all()
    assert (values[-1] == 1).all()


def test_fewer_k_than_samples_and_two_samples() -> None:
    np.testing.assert_allclose(pass_at_k_values(2, np.asarray([0, 1, 2]), 2), [[0, 0], [0.5, 1], [1, 1]])
    assert pass_at_k_values(4, [1], 2).tolist() == [[0.25, 0.5]]


@pytest.mark.parametrize(("num_correct", "largest_k"), [([-1], 1), ([2, 5], 1), ([2], 0), ([2], 5)])
def test_impossible_counts_are_refused_at_once(num_correct: list[int], largest_k: int) -> None:
    with pytest.raises(ValueError, match="num_correct"):
        pass_at_k_values(4, num_correct, largest_k)
