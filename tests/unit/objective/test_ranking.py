"""Order statistics over ranks equal those of the sorted values, however the ranks hold them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from minpro_megatron.objective.across_ranks.ranking import (
    Boundary,
    OneRank,
    Ranks,
    boundary,
    order_statistic,
    quantile,
    smallest,
)
from tests.support.lockstep_ranks import on_ranks

TINY = 5e-324  # the smallest denormal
VALUES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda random: random.normal(0, 3, 60),
    "ties": lambda random: random.integers(-3, 4, 60) / 2,
    "all equal": lambda random: np.full(17, -2.5),
    "one": lambda random: random.normal(0, 1, 1),
    "zeros of both signs": lambda random: random.choice(np.array([0.0, -0.0, 1.0, -1.0]), 40),
    "denormals": lambda random: random.integers(-9, 10, 40) * TINY,
    "every magnitude": lambda random: random.choice([-1.0, 1.0], 60) * 10.0 ** random.uniform(-300, 300, 60),
    "extremes": lambda random: random.choice(np.array([1.7e308, -1.7e308, 2.3e-308, TINY, -TINY, 0.0]), 30),
    "neighbours": lambda random: np.nextafter(1.0, 2.0) ** random.integers(0, 4, 30),
    "with infinities": lambda random: random.choice(np.array([np.inf, -np.inf, 1.0, 2.0]), 30),
}


def spread(values: np.ndarray, how: str, random: np.random.Generator) -> list[np.ndarray]:
    """The places of `values` that each of some ranks holds."""
    places = np.arange(len(values))
    if how == "one rank":
        return [places]
    if how == "sorted among three":
        return np.array_split(np.argsort(values), 3)
    if how == "all on the last of three":
        return [places[:0], places[:0], places]
    if how == "three on ranks of their own":
        return [places[at : at + 1] for at in range(min(3, len(places)))] + [places[3:]]
    owner = random.integers(0, 4, len(values))
    return [places[owner == rank] for rank in range(4)]


SPREADS = ["one rank", "at random", "sorted among three", "all on the last of three", "three on ranks of their own"]
CASES = [(kind, "at random") for kind in VALUES] + [("ties", how) for how in SPREADS] + [("one", SPREADS[3])]


def drawn(kind: str, how: str) -> tuple[np.ndarray, list[np.ndarray], list[Tensor]]:
    """(all values, the places on each rank, the values on each rank)"""
    random = np.random.default_rng(len(kind) + 100 * len(how))
    values = VALUES[kind](random)
    parts = spread(values, how, random)
    return values, parts, [torch.tensor(values[part]) for part in parts]


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_order_statistics_are_those_of_the_sorted_values(kind: str, how: str) -> None:
    values, _, held = drawn(kind, how)
    for place in {0, len(values) // 3, len(values) - 1}:

        def at_place(part: Tensor, ranks: Ranks, place: int = place) -> float:
            return order_statistic(part, place, ranks)

        assert on_ranks(at_place, held) == [np.sort(values)[place]] * len(held)


@pytest.mark.parametrize(("kind", "how"), [case for case in CASES if case[0] != "with infinities"])
def test_quantiles_are_numpys(kind: str, how: str) -> None:
    values, _, held = drawn(kind, how)
    for share in (0.01, 0.5, 0.83):
        found = on_ranks(lambda part, ranks, share=share: quantile(part, share, ranks), held)
        with np.errstate(over="ignore"):
            expected = np.quantile(values, share)
        np.testing.assert_array_equal(found, [expected] * len(held))


def test_a_quantile_on_a_value_is_the_value() -> None:
    values = np.random.default_rng(0).normal(0, 1, 101)
    for percent in range(101):
        share = percent / 100
        if share * 100 == percent:  # where the place is a whole number
            assert quantile(torch.tensor(values), share, OneRank()) == np.sort(values)[percent]


def test_the_quantile_of_equal_values_is_the_value() -> None:
    for value in (0.1, -7.3e-12, 1.7e308):
        assert quantile(torch.full((13,), value, dtype=torch.float64), 0.37, OneRank()) == value


def test_of_no_values_there_is_no_order_statistic() -> None:
    nothing = [torch.zeros(0, dtype=torch.float64)] * 2
    assert np.isnan(on_ranks(lambda part, ranks: quantile(part, 0.5, ranks), nothing)).all()
    for place in (0, -1, 3):
        with pytest.raises(ValueError, match=f"place = {place}: there are not that many values"):
            order_statistic(torch.arange(3.0)[: 3 * (place != 0)], place, OneRank())


@pytest.mark.parametrize(("kind", "how"), [case for case in CASES if case[0] != "with infinities"])
def test_the_smallest_go_by_value_and_then_by_id(kind: str, how: str) -> None:
    values, parts, _ = drawn(kind, how)
    ids = np.random.default_rng(5).permutation(len(values)) * 7 + 3
    order = sorted(range(len(values)), key=lambda place: (values[place] + 0.0, ids[place]))
    for how_many in {0, 1, len(values) // 2, len(values) + 5}:
        chosen = set(order[:how_many])

        def on_rank(part: np.ndarray, ranks: Ranks, how_many: int = how_many) -> list[bool]:
            return smallest(torch.tensor(values[part]), torch.tensor(ids[part]), how_many, ranks).tolist()

        assert on_ranks(on_rank, parts) == [[place in chosen for place in part] for part in parts]


def test_zeros_of_either_sign_are_equal() -> None:
    values, ids = torch.tensor([0.0, -0.0, -0.0, 0.0, 1.0]), torch.arange(5)
    for how_many in range(6):
        assert smallest(values, ids, how_many, OneRank()).tolist() == [place < how_many for place in range(5)]


@pytest.mark.parametrize("how", SPREADS)
def test_the_boundary_is_where_a_condition_on_counts_and_sums_ends(how: str) -> None:
    values, _, held = drawn("ties", how)
    values, held = values + 4, [part + 4 for part in held]  # positive: sums grow
    for limit in (0.4, 3.0, 20.5, values.sum() - 0.1):
        ascending = np.sort(values)
        first = int(np.argmax(np.array([ascending[ascending <= value].sum() for value in ascending]) > limit))
        below = values[values < ascending[first]]
        expected = Boundary(ascending[first], len(below), below.sum())

        def edge(part: Tensor, ranks: Ranks, limit: float = limit) -> Boundary | None:
            return boundary(part, lambda count, total, value: total <= limit, ranks)

        assert on_ranks(edge, held) == [expected] * len(held)


def test_a_boundary_may_lie_between_values() -> None:
    for held in ([torch.tensor([1.0, 5.0])], [torch.tensor([1.0]), torch.tensor([5.0]), torch.zeros(0)]):
        found = on_ranks(lambda part, ranks: boundary(part, lambda count, total, value: value < 3.25, ranks), held)
        assert found == [Boundary(3.25, 1, 1.0)] * len(held)


def test_there_is_no_boundary_where_the_condition_holds_for_all_values_or_there_are_none() -> None:
    for held in ([torch.tensor([3.0, -1.0]), torch.zeros(0)], [torch.zeros(0), torch.zeros(0)]):
        assert on_ranks(lambda part, ranks: boundary(part, lambda count, *_: count <= 2, ranks), held) == [None, None]
    assert boundary(torch.zeros(0), lambda count, *_: count > 0, OneRank()) is None


def test_nan_neither_hangs_nor_hides_the_other_values() -> None:
    held = [torch.tensor([3.0, float("nan"), 1.0]), torch.tensor([float("nan"), 2.0])]
    found = on_ranks(lambda part, ranks: [order_statistic(part, place, ranks) for place in range(5)], held)
    assert found[0][:3] == found[1][:3] == [1.0, 2.0, 3.0]  # positive NaN is beyond infinity
    assert np.isnan([ranks[3:] for ranks in found]).all()
