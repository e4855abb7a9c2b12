"""What objectives find out about a whole mini-batch is what a loop over it finds, however it is cut."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.config.objective import (
    M2poConfig,
    M2poWinsorizedConfig,
    ObjectiveSection,
    PrefixFilterConfig,
    SatConfig,
    ShuffledMinproConfig,
)
from minpro_megatron.objective.across_ranks.ranking import Ranks
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import MiniBatch
from tests.support import objective_loops as loops
from tests.support.lockstep_ranks import on_ranks
from tests.support.ragged_tokens import DEFAULTS, Tokens, cut, far_tokens, one_sequence, prefix_minima, random_tokens

SURVEYS: dict[str, ObjectiveSection] = {
    "m2po": M2poConfig(second_moment=0.2),
    "m2po_winsorized": M2poWinsorizedConfig(second_moment=0.2),
    "prefix_filter": PrefixFilterConfig(quantile=0.2),
    "sat": SatConfig(),
    "shuffled_minpro": ShuffledMinproConfig(),
}
Cut = list[list[np.ndarray]]  # [rank][micro-batch] places of tokens


def test_the_settings_say_which_objectives_survey() -> None:
    """The planner reads it there: it imports no torch."""
    sections = {name: type(section) for name, section in DEFAULTS.items()}
    assert {name: section.surveys_mini_batch for name, section in sections.items()} == {
        name: objective.survey is not None for name, objective in OBJECTIVES.items()
    }


def whole(tokens: Tokens) -> Cut:
    return [[np.arange(len(tokens.mask))]]


def cuts(tokens: Tokens) -> list[Cut]:
    """Whole; in micro-batches; among ranks of which the last holds nothing; both, in an order of their own."""
    parts = cut(tokens, 5, seed=2)
    nothing = np.zeros(0, np.int64)
    return [whole(tokens), [parts], [[parts[2], parts[0]], [*parts[3:], parts[1]], [nothing]], [[p] for p in parts]]


def survey(name: str, tokens: Tokens, held: Cut, settings: ObjectiveSection | None = None, seed: int = 0) -> np.ndarray:
    """What the survey says of each token, by the ranks that hold the micro-batches `held`."""
    run = OBJECTIVES[name].survey
    assert run is not None

    def on_rank(places: list[np.ndarray], ranks: Ranks) -> list[np.ndarray]:
        seen = [tokens.where(place).for_objective(torch.float32, ids=place) for place in places]
        return [found.numpy() for found in run(MiniBatch(seen, ranks, seed), settings or SURVEYS[name])]

    found = np.full(len(tokens.mask), np.nan)
    for places, of_rank in zip(held, on_ranks(on_rank, held), strict=True):
        for place, of_micro_batch in zip(places, of_rank, strict=True):
            found[place] = of_micro_batch
    return found


def marked(found: np.ndarray) -> set[int]:
    assert set(found.tolist()) <= {0.0, 1.0}
    return set(np.flatnonzero(found).tolist())


def with_log_ratios(log_ratios: list[float], advantage: float = 1.0) -> Tokens:
    return replace(one_sequence([1.0] * len(log_ratios), advantage), log_probs=np.array(log_ratios))


@pytest.mark.parametrize("name", SURVEYS)
@pytest.mark.parametrize("far", [False, True])
def test_the_cut_into_micro_batches_and_ranks_changes_nothing(name: str, far: bool) -> None:
    tokens = far_tokens(31) if far else random_tokens(31)
    expected = survey(name, tokens, whole(tokens))
    assert expected[tokens.trained].any()
    for held in cuts(tokens)[1:]:
        np.testing.assert_array_equal(survey(name, tokens, held), expected)


@pytest.mark.parametrize("name", SURVEYS)
def test_a_mini_batch_without_trained_tokens_is_surveyed(name: str) -> None:
    tokens = random_tokens(32)
    tokens = replace(tokens, mask=np.zeros_like(tokens.mask))
    for held in cuts(tokens):
        found = survey(name, tokens, held)
        assert (found == (20 if name == "m2po_winsorized" else 0)).all()


@pytest.mark.parametrize("name", SURVEYS)
@pytest.mark.parametrize("advantage", [1.7, -1.3])
def test_nan_does_not_stop_a_survey_and_is_never_left_out(name: str, advantage: float) -> None:
    tokens = random_tokens(33)
    place = int(np.flatnonzero(tokens.trained)[30])
    log_probs = tokens.log_probs.copy()
    log_probs[place] = np.nan
    advantages = np.where(tokens.sequence == tokens.sequence[place], np.float32(advantage), tokens.advantages)
    tokens = replace(tokens, log_probs=log_probs, advantages=advantages)
    for held in (whole(tokens), cuts(tokens)[2]):
        found = survey(name, tokens, held)
        if name in ("m2po", "prefix_filter"):
            assert place not in marked(found)


# ---- M2PO


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [0.04, 0.3, 2.0])
def test_m2po_leaves_out_what_masking_one_token_after_the_other_does(seed: int, budget: float) -> None:
    tokens = random_tokens(seed, drift=0.4 + seed / 3)
    expected = loops.m2po_left_out(tokens, budget)
    found = survey("m2po", tokens, whole(tokens), M2poConfig(second_moment=budget))
    assert marked(found) == expected
    assert expected <= set(loops.harmful_tokens(tokens))


@pytest.mark.parametrize("budget", [1 / 256, 1 / 64, 1 / 16, 5 / 64, 1 / 8, 1 / 4, 1 / 2])
@pytest.mark.parametrize("seed", range(3))
def test_of_equal_squares_the_first_tokens_stay(seed: int, budget: float) -> None:
    random = np.random.default_rng(seed)
    tokens = random_tokens(seed, num_sequences=10)
    eighths = random.integers(-6, 7, len(tokens.mask)) / 8  # squares and their sums are exact, and few different
    tokens = replace(tokens, log_probs=eighths, behavior=np.zeros(len(eighths)))
    expected = loops.m2po_left_out(tokens, budget)
    for held in cuts(tokens):
        assert marked(survey("m2po", tokens, held, M2poConfig(second_moment=budget))) == expected


@pytest.mark.parametrize(
    ("log_ratios", "budget", "left_out"),
    [
        ([0.5, 0.25, 0.125], 0.1093750, set()),  # the mean, (16 + 4 + 1) / 64 / 3, is the budget: it holds
        ([0.5, 0.25, 0.125], 0.109, {0}),
        ([0.5, 0.25, 0.125], 5 / 128, {0}),  # now the mean of the other two is the budget
        ([0.5, 0.25, 0.125], 0.039, {0, 1}),
        ([0.5, 0.25, 0.125], 1 / 64, {0, 1}),
        ([0.5, 0.25, 0.125], 0.0156, {0, 1, 2}),  # every harmful token goes
        ([0.5, 0.5, 0.5, 0.5], 0.25, set()),
        ([0.5, 0.5, 0.5, 0.5], 0.2499, {0, 1, 2, 3}),
        ([0.5, 0.0, 0.5, 0.5], 0.2499, {0, 2, 3}),  # a ratio of 1 is not harmful and saves nobody
        ([0.25, 0.5, -9.0, 0.5, 0.5], 5 / 32, {3, 4}),  # (4 + 16) / 64 / 2
        ([-1.0, -20.0, 0.0], 0.04, set()),  # nothing is harmful
    ],
)
def test_m2po_case_by_case(log_ratios: list[float], budget: float, left_out: set[int]) -> None:
    for advantage in (1.0, -2.0):
        tokens = with_log_ratios([math.copysign(1, advantage) * value for value in log_ratios], advantage)
        assert marked(survey("m2po", tokens, whole(tokens), M2poConfig(second_moment=budget))) == left_out
    assert loops.m2po_left_out(with_log_ratios(log_ratios), budget) == left_out


# ---- M2PO as its authors' code has it


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [0.001, 0.04, 0.3, 2.0])
def test_the_winsorizing_bound_is_that_of_the_authors_code(seed: int, budget: float) -> None:
    tokens = random_tokens(seed, drift=0.4 + seed / 3)
    found = survey("m2po_winsorized", tokens, whole(tokens), M2poWinsorizedConfig(second_moment=budget))
    expected = loops.winsorizing_log_ratio(tokens, budget)
    assert set(found.tolist()) == {20.0 if expected is None else expected}


@pytest.mark.parametrize(
    ("log_ratios", "budget", "tau"),
    [
        # squares of 64ths: 1, 4, 16; capped sums 3, 9, 21
        ([0.5, 0.25, 0.125], 7 / 64, 20.0),  # the plain mean is the budget
        ([0.5, 0.25, 0.125], 6.9 / 64, 0.25),
        ([0.5, 0.25, 0.125], 3.1 / 64, 0.25),
        ([0.5, 0.25, 0.125], 3 / 64, 0.125),  # on a capped sum: >= holds there
        ([0.5, 0.25, 0.125], 1 / 64, 0.0),  # already the first: nothing before it
        ([0.5, 0.25, 0.125], 0.9 / 64, 0.0),
        ([0.5, 0.25, 0.25, 0.125], 5 / 64, 0.25),  # equal squares count together: 4, 13, 13, 25
        ([0.5, 0.25, 0.25, 0.125], 13 / 4 / 64, 0.125),
        ([0.5, 0.25, -9.0, 0.125, 0.0], 6.9 / 64, 0.25),  # only harmful tokens count
        ([-0.5, -3.0], 0.04, 20.0),  # none is harmful
    ],
)
def test_the_winsorizing_bound_case_by_case(log_ratios: list[float], budget: float, tau: float) -> None:
    for advantage in (1.0, -2.0):
        tokens = with_log_ratios([math.copysign(1, advantage) * value for value in log_ratios], advantage)
        settings = M2poWinsorizedConfig(second_moment=budget)
        assert set(survey("m2po_winsorized", tokens, whole(tokens), settings).tolist()) == {tau}
        assert loops.winsorizing_log_ratio(tokens, budget) == (None if tau == 20 else tau)


def test_a_budget_that_is_the_mean_up_to_rounding_does_not_stop_the_survey() -> None:
    for seed in range(15):
        log_ratios = np.random.default_rng(seed).exponential(1, 37).astype(np.float32).tolist()
        tokens = with_log_ratios(log_ratios)
        mean = math.fsum(value**2 for value in log_ratios) / 37
        for units in (-2, -1, 0, 1):
            settings = M2poWinsorizedConfig(second_moment=mean + units * math.ulp(mean))
            (tau,) = set(survey("m2po_winsorized", tokens, whole(tokens), settings).tolist())
            assert tau in (20.0, sorted(log_ratios)[-2], max(log_ratios))


# ---- the prefix filter


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_prefix_filter_marks_products_below_numpys_quantile(seed: int, share: float) -> None:
    tokens = random_tokens(seed, drift=0.4 + seed / 3)
    found = survey("prefix_filter", tokens, whole(tokens), PrefixFilterConfig(quantile=share))
    expected = loops.prefix_filter_left_out(tokens, share)
    assert marked(found) == expected
    assert len(expected) == math.ceil(share * (tokens.trained.sum() - 1))  # no ties here


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.3, 0.5, 0.6, 0.75])
def test_tokens_whose_product_is_the_quantile_stay(share: float) -> None:
    steps = [0.0, -0.5, 0.0, 0.0, -0.5, 0.0, 0.25, -0.25, -1.0, 0.0, 0.5]  # products: e^0, e^-.5 three times, ...
    tokens = with_log_ratios(steps)
    found = marked(survey("prefix_filter", tokens, whole(tokens), PrefixFilterConfig(quantile=share)))
    assert found == loops.prefix_filter_left_out(tokens, share)
    products = np.exp(np.cumsum(steps))
    kept = products[sorted(set(range(len(steps))) - found)]
    assert kept.min() > max((products[place] for place in found), default=0.0)  # equal products share their fate


def test_a_quantile_on_a_token_keeps_it() -> None:
    tokens = with_log_ratios([-0.5] * 5)  # place 0.25 * 4 = 1: the second smallest product itself
    assert marked(survey("prefix_filter", tokens, whole(tokens), PrefixFilterConfig(quantile=0.25))) == {4}


def test_products_that_a_float32_cannot_tell_apart_are_different() -> None:
    tokens = with_log_ratios([0.0, -1e-9, 0.5, 1.0])
    tokens = replace(tokens, behavior=np.ones(4), sequence=np.arange(4))
    assert marked(survey("prefix_filter", tokens, whole(tokens), PrefixFilterConfig(quantile=0.3))) == {1}


def test_products_too_small_for_a_float_keep_their_order() -> None:
    tokens = with_log_ratios([-20.0] * 100)  # down to exp(-2000)
    found = survey("prefix_filter", tokens, whole(tokens), PrefixFilterConfig(quantile=0.101))
    assert marked(found) == set(range(90, 100))


# ---- SAT's tail


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_sat_contracts_beyond_the_quantile_of_the_whole_mini_batch(seed: int, share: float, ratio: Any) -> None:
    tokens, settings = random_tokens(seed, drift=0.1 + seed / 9), SatConfig(ratio=ratio, quantile=share)
    expected = np.array(loops.sat_contractions(tokens, settings))
    for held in cuts(tokens):
        found = survey("sat", tokens, held, settings)
        np.testing.assert_allclose(found[tokens.trained], expected[tokens.trained], rtol=1e-12)
    sizes = np.abs(loops.sat_log_ratios(tokens, settings))[tokens.trained]
    edge = np.quantile(sizes, share, method="inverted_cdf")
    assert ((found[tokens.trained] < 1) == (sizes > edge)).all()


def test_sat_contracts_nothing_where_most_ratios_are_one_or_the_tail_is_tied() -> None:
    for log_ratios in ([0.0] * 19 + [0.5], [0.1] + [0.5] * 9):  # q = 0; q is the largest
        tokens = with_log_ratios(log_ratios)
        assert survey("sat", tokens, whole(tokens)).tolist() == [1.0] * len(log_ratios)


# ---- shuffled MinPRO


def buckets(tokens: Tokens) -> dict[int, list[int]]:
    """Trained tokens by bucket: the first of their sequence, the second and third, the 4th to 7th, ..."""
    members: dict[int, list[int]] = {}
    for trained in tokens.trained_of_sequences():
        for position, place in enumerate(trained, start=1):
            members.setdefault(position.bit_length(), []).append(place)
    return members


def test_the_shuffle_permutes_the_prefix_minima_inside_position_buckets() -> None:
    tokens = random_tokens(34, num_sequences=20, longest=70)
    minima = np.array(prefix_minima(tokens))
    found = survey("shuffled_minpro", tokens, whole(tokens))
    moved = 0
    for members in buckets(tokens).values():
        np.testing.assert_allclose(np.sort(found[members]), np.sort(minima[members]), rtol=1e-14)
        moved += int(np.sum(np.abs(found[members] - minima[members]) > 1e-9))
    assert len(buckets(tokens)) >= 6
    assert moved > 0.5 * tokens.trained.sum()
    assert (found[~tokens.trained] == 0).all()


def test_the_shuffle_depends_on_the_seed_alone() -> None:
    tokens = random_tokens(35)
    first, again, other = (survey("shuffled_minpro", tokens, whole(tokens), seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first != other)[tokens.trained].mean() > 0.3


def test_every_minimum_reaches_every_token_of_its_bucket() -> None:
    minima = [0.125, 0.25, 0.375, 0.5]
    tokens = replace(with_log_ratios([0.0] * 8), sequence=np.repeat(np.arange(4), 2))
    tokens.log_probs[::2] = minima  # of the second tokens, one of each sequence
    got = np.stack([np.log(survey("shuffled_minpro", tokens, whole(tokens), seed=seed)[1::2]) for seed in range(80)])
    counts = np.array([np.isclose(got, minimum).sum(0) for minimum in minima])
    assert (counts.sum(0) == 80).all()
    assert counts.min() >= 8  # 20 expected, with a deviation of 4
