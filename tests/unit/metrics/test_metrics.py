"""Metrics merge exactly, whatever the order and the sizes of the parts."""

import math
import random
from fractions import Fraction

import pytest

from minpro_megatron.metrics.declared import METRICS, check_declared, metric_table
from minpro_megatron.metrics.metric import Metric, largest, mean, merge, smallest, total, values


def exact_mean(parts: list[list[float]]) -> float:
    observations = [Fraction(value) for part in parts for value in part]
    return float(sum(observations) / len(observations))


@pytest.mark.parametrize("seed", range(20))
def test_merging_uneven_parts_equals_one_pass_over_everything(seed):
    generator = random.Random(seed)
    parts = [[generator.gauss(0, 10**6) for _ in range(generator.randint(1, 9))] for _ in range(7)]
    merged = merge(
        [
            {
                "m": mean(math.fsum(part), len(part)),
                "t": total(math.fsum(part)),
                "l": largest(max(part)),
                "s": smallest(min(part)),
            }
            for part in parts
        ]
    )
    everything = [value for part in parts for value in part]
    assert merged["m"].value == pytest.approx(exact_mean(parts), rel=1e-12)
    assert merged["t"].value == pytest.approx(math.fsum(everything), rel=1e-12)
    assert merged["l"].value == max(everything)
    assert merged["s"].value == min(everything)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_parts_changes_no_bit(seed):
    generator = random.Random(seed)
    parts = [{"m": mean(generator.gauss(0, 1) * 10 ** generator.randint(-8, 8), 3)} for _ in range(9)]
    expected = merge(parts)["m"]
    generator.shuffle(parts)
    assert merge(parts)["m"] == expected


def test_a_mean_of_means_is_not_what_it_computes():
    assert merge([{"m": mean(0.0, 99)}, {"m": mean(1.0, 1)}])["m"].value == 0.01


def test_parts_without_a_name_or_without_observations_do_not_count():
    merged = merge([{"a": mean(6, 2)}, {"b": largest(-1)}, {"a": mean(0, 0)}, {"b": Metric(0, 0, "max")}])
    assert values(merged) == {"a": 3.0, "b": -1.0}


def test_nothing_observed_has_no_value():
    merged = merge([{"a": mean(0, 0)}, {"a": mean(0, 0)}])
    assert math.isnan(merged["a"].value)
    assert values(merged) == {}
    assert merge([]) == {}


@pytest.mark.parametrize("make", [largest, smallest, total, lambda value: mean(value, 1)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_is_not_lost(make, place):
    numbers = [1.0, 2.0, 3.0]
    numbers[place] = math.nan
    assert math.isnan(merge([{"a": make(number)} for number in numbers])["a"].value)


def test_infinities_and_overflow_do_not_raise():
    assert math.isinf(merge([{"a": total(1e308)}, {"a": total(1e308)}])["a"].value)
    assert math.isnan(merge([{"a": total(math.inf)}, {"a": total(-math.inf)}])["a"].value)


def test_different_reductions_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"metric 'a': cannot merge reductions max and mean"):
        merge([{"a": mean(1, 1)}, {"a": largest(1)}])


def test_undeclared_names_are_refused():
    check_declared(["reward/mean", "ratio/min"])
    with pytest.raises(ValueError, match="undeclared metrics reward/maen"):
        check_declared(["reward/maen", "ratio/min"])


def test_every_declared_name_is_in_the_table_once():
    rows = metric_table().splitlines()[2:]
    assert len(rows) == len(METRICS)
    for name, row in zip(METRICS, rows, strict=True):
        assert row.startswith(f"| `{name}` |")
        assert len(row.replace("\\|", "").split("|")) == 6  # four cells between five bars
        assert name.partition("/<")[0].count("/") == 1
