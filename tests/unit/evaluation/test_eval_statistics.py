"""maj@k against enumerating every draw, bootstrap intervals against what they should cover."""

from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from minpro_megatron.evaluation.intervals import average, estimates, intervals, resampled_means
from minpro_megatron.evaluation.majority import NO_ANSWER, RIGHT, majority_at_k, normalised, votes

ANSWERS = [RIGHT, RIGHT, RIGHT, 1, 1, 1, 2, NO_ANSWER, NO_ANSWER]


def exact_majority(answers: list[int], k: int) -> float:
    """Over every subset of k samples; ties are shared, samples without an answer do not vote."""
    total, num_subsets = Fraction(0), 0
    for subset in combinations(answers, k):
        num_subsets += 1
        counts = Counter(answer for answer in subset if answer != NO_ANSWER)
        most = max(counts.values(), default=0)
        winners = [answer for answer, count in counts.items() if count == most]
        total += Fraction(RIGHT in winners, max(len(winners), 1))
    return float(total / num_subsets)


def test_majority_is_that_of_every_draw() -> None:
    ks = [1, 2, 3, 5, 8, 9]
    found = majority_at_k(np.asarray([ANSWERS]), ks, seed=0, num_draws=4000)[0]
    exact = np.asarray([exact_majority(ANSWERS, k) for k in ks])
    # 4 standard errors of a share out of 4000 draws
    assert np.abs(found - exact).max() < 4 * 0.5 / np.sqrt(4000)
    assert found[0] == pytest.approx(3 / 9, abs=1e-15)
    assert found[-1] == 0.5  # all samples: right and 1 are tied


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([RIGHT] * 4, 1.0),
        ([1, 1, 2, 2], 0.0),
        ([NO_ANSWER] * 4, 0.0),
        ([RIGHT, NO_ANSWER, NO_ANSWER, NO_ANSWER], 1.0),
        ([RIGHT, 1, 2, 3], 0.25),
    ],
)
def test_majority_of_all_samples(answers: list[int], expected: float) -> None:
    assert majority_at_k(np.asarray([answers]), [4], seed=0).tolist() == [[expected]]


def test_each_prompt_has_draws_of_its_own_and_the_seed_decides_them() -> None:
    table = np.asarray([ANSWERS, ANSWERS])
    first, second = majority_at_k(table, [2], seed=3), majority_at_k(table, [2], seed=3)
    assert (first == second).all()
    assert first[0] != first[1]


def test_right_answers_are_one_class_and_wrong_ones_count_by_value() -> None:
    answers = ["1/2", "0.5", "\\frac{1}{4}", "0.25", "$ 7 $", None, "7."]
    right = [True, True, False, False, False, False, False]
    assert votes(answers, right).tolist() == [0, 0, 1, 1, 2, NO_ANSWER, 2]
    assert votes([None], [True]).tolist() == [RIGHT]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1,234", "1234"),
        ("1,2,3", "1,2,3"),
        ("(1,234)", "(1,234)"),
        ("12,345.50", "24691/2"),
        ("-\\dfrac{2}{4}", "-1/2"),
        ("-\\frac{1}{0}", "-1/0"),
        ("4/2", "2"),
        ("0.0", "0"),
        ("\\left( x,\\, y \\right)", "(x,y)"),
        ("x\\leftarrow y", "x\\leftarrowy"),
        ("x^2 + 1", "x^2+1"),
        ("", ""),
    ],
)
def test_equal_numbers_are_spelled_alike(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_resampled_means_are_those_of_prompts_drawn_with_replacement() -> None:
    values = np.asarray([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]])
    means = resampled_means(values, seed=1, num_resamples=20000)
    assert means.shape == (20000, 2)
    np.testing.assert_allclose(means[:, 1], means[:, 0] + 10)  # a prompt's values stay together
    assert means[:, 0].mean() == pytest.approx(1.0, abs=0.02)
    assert means[:, 0].std() == pytest.approx(np.sqrt(2 / 3 / 3), rel=0.03)  # deviation of the three / sqrt(3)
    assert (means[:, 0] == 0).mean() == pytest.approx(1 / 27, abs=0.01)


def test_intervals_cover_what_they_should() -> None:
    """95 % intervals of means of 40 prompts whose mean is known hold it about 95 % of the time."""
    generator = np.random.default_rng(5)
    held = 0
    for trial in range(60):
        values = generator.random((40, 1))
        (estimate,) = intervals(values.mean(axis=0), resampled_means(values, seed=trial, num_resamples=300))
        assert estimate.low <= estimate.value <= estimate.high
        held += estimate.low <= 0.5 <= estimate.high
    assert 50 <= held <= 60


def test_a_single_prompt_has_no_width() -> None:
    (estimate,) = estimates(np.asarray([[0.25]]), seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (0.25, 0.25, 0.25)


def test_the_average_counts_each_benchmark_the_same() -> None:
    small, large = np.asarray([[1.0], [0.0]]), np.full((100, 1), 0.5)
    found = average([resampled_means(values, 0)[:, 0] for values in (small, large)], [0.5, 0.5])
    assert found.value == 0.5
    # half of the small one's, which reaches from 0 to 1; the large one has no spread
    assert (found.low, found.high) == (0.25, 0.75)
