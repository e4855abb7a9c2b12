"""The stability study's measures: metric, collapse, intervals, corrections and relative variance, by known answers."""

import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, ttest_rel

from benchmarks.stability_study.analysis import collapse, relative_variance, steps_to_collapse
from benchmarks.stability_study.gradients import moments
from benchmarks.stability_study.measures import collapse_version, difference, holm, last_third, paired
from benchmarks.stability_study.record import primary_metric
from tests.support.stability_records import AT_START, KEY, made


def test_the_primary_metric_is_the_last_thirds_mean_and_0_after_an_end() -> None:
    run = replace(made(KEY, 0.0), heldout=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert last_third(range(0, 31, 5), run.heldout) == primary_metric(run) == pytest.approx(0.65)
    ended = replace(run, heldout=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], ended_at=27)
    assert primary_metric(ended) == pytest.approx(0.3)
    assert collapse(ended) == 30
    assert collapse(replace(ended, heldout=[0.0, 0.0], ended_at=7)) == 7
    assert (collapse(run), steps_to_collapse(run)) == (None, 30)


def test_a_dip_that_recovers_is_no_collapse() -> None:
    versions = [0, 5, 10, 15, 20]
    assert collapse_version(versions, [0.2, 0.8, 0.3, 0.5, 0.3]) == 20
    assert collapse_version(versions, [0.2, 0.8, 0.3, 0.3, 0.1]) == 10
    assert collapse_version(versions, [0.2, 0.8, 0.3, 0.5, 0.4]) is None


def test_intervals_cover_and_p_values_are_students() -> None:
    random = np.random.default_rng(1)
    for count, comparisons_made in ((5, 1), (10, 1), (5, 21)):
        draws = random.normal(0.3, 1.0, (4000, count))
        covered = [
            low < 0.3 < high for low, high in (difference(list(row)).interval(comparisons_made) for row in draws)
        ]
        expected = 1 - 0.05 / comparisons_made
        assert abs(fmean(covered) - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)
    ours, theirs = random.normal(0.5, 0.1, 6), random.normal(0.4, 0.1, 6)
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)) | {9: 5.0})  # seed 9 has no partner
    expected = ttest_rel(ours, theirs)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert math.isnan(difference([0.3]).p_value)
    assert difference([0.3]).interval() == (-math.inf, math.inf)


def test_holm_keeps_the_error_rate_of_a_family() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979, worked out by hand
    assert holm([math.nan, 0.02])[1] == pytest.approx(0.04)
    random = np.random.default_rng(2)
    families = random.random((2000, 21))
    wrong = fmean(min(holm(list(family))) < 0.05 for family in families)
    assert abs(wrong - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2000)
    # never below the adjustment that controls less, the false discovery rate
    assert all((np.array(holm(list(row))) >= false_discovery_control(row) - 1e-12).all() for row in families[:50])


@pytest.mark.parametrize("expected", [100.0, 10.0, 0.1])
def test_the_relative_variance_is_that_of_the_gradients_distribution(expected: float) -> None:
    random = torch.Generator().manual_seed(0)
    compared = [AT_START]
    for _ in range(60):
        # 16 groups and 20,000 parameters: the sum has a mean of norm 1 and a covariance of trace `expected`
        parts = torch.randn(16, 20_000, generator=random) * math.sqrt(expected / 16 / 20_000)
        parts[:, 0] += 1 / 16
        squared_norm, variance = moments(parts)
        compared.append({"cispo/squared_norm": squared_norm, "cispo/variance": variance})
    found = relative_variance(replace(made(KEY, 0.5), compared=compared), "cispo")
    assert math.exp(found) == pytest.approx(expected, rel=0.3)
