"""Figures are judged by their limits: what is beyond one, NaN or missing is a problem."""

import math

import pytest

from minpro_megatron.gpu_checks.outcome import Figure, Limit, judged


@pytest.mark.parametrize(
    ("figure", "limit", "problem"),
    [
        (1.0, Limit("x", at_most=1), None),
        (1.01, Limit("x", at_most=1), "x = 1.01, at most 1 is allowed"),
        (0.5, Limit("x", at_least=0.6), "x = 0.5, at least 0.6 is needed"),
        (0.7, Limit("x", at_least=0.6, at_most=0.8), None),
        (math.nan, Limit("x", at_most=1), "x = nan, at most 1 is allowed"),
        (math.nan, Limit("x", at_least=1), "x = nan, at least 1 is needed"),
        (None, Limit("x", at_most=1), None),  # the device cannot measure it
    ],
)
def test_a_limit(figure: Figure, limit: Limit, problem: str | None) -> None:
    assert list(judged({"x": figure}, [limit]).problems) == ([problem] if problem else [])


def test_a_limit_of_something_that_was_not_measured_is_broken() -> None:
    assert judged({"x": 1.0}, [Limit("y", at_most=1)], ["before"]).problems == ["before", "y was not measured"]


def test_a_limit_as_text() -> None:
    assert str(Limit("x", at_least=0.5, at_most=2)) == "x >= 0.5 and <= 2"
    assert str(Limit("x", at_most=2)) == "x <= 2"
