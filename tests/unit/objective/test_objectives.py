"""Every objective equals a float64 loop written from its paper, and the loss has exactly the gradient it states."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.config import objective as config
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import ObjectiveTerms, policy_tokens, summed_loss, summed_value
from tests.support import objective_loops as loops
from tests.support.objective_loops import LOOPS, clip
from tests.support.objective_settings import OTHERS
from tests.support.ragged_tokens import (
    DEFAULTS,
    Tokens,
    far_tokens,
    long_tokens,
    one_sequence,
    prefix_minima,
    random_tokens,
    surveyed,
    terms_of,
)

# log-probs come in float32 and every number after them is float64: from the same float32 numbers both are as exact
PRECISIONS, TOLERANCE = (torch.float32, torch.float64), 1e-11
# rho = (1.5, .5, 2, 30, 1): every interesting case of MinPRO in five tokens
FIVE_RATIOS = [1.5, 0.5, 2.0, 30.0, 1.0]

TOKENS: dict[str, Callable[[], Tokens]] = {
    "ragged": lambda: random_tokens(0),
    "ragged again": lambda: random_tokens(1),
    "small drift": lambda: random_tokens(2, drift=0.1),
    "large drift": lambda: random_tokens(3, drift=2.0),
    "far beyond every clip": lambda: far_tokens(4),
    "long": lambda: long_tokens(5),
    "single tokens": lambda: random_tokens(6, num_sequences=40, longest=1),
}


def assert_trained_equal(found: torch.Tensor, expected: Sequence[float] | np.ndarray, tokens: Tokens) -> None:
    """Relative for large numbers, absolute near zero."""
    np.testing.assert_allclose(
        found.numpy()[tokens.trained], np.array(expected)[tokens.trained], rtol=TOLERANCE, atol=TOLERANCE
    )


def test_every_objective_has_settings_and_a_loop() -> None:
    assert OBJECTIVES.keys() == DEFAULTS.keys() == OTHERS.keys() == LOOPS.keys() | {"shuffled_minpro"}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("settings", [DEFAULTS, OTHERS], ids=["papers", "others"])
def test_coefficients_and_values_are_those_of_the_papers_loop(kind: str, settings: dict, name: str) -> None:
    tokens = TOKENS[kind]()
    expected = LOOPS[name](tokens, settings[name])
    for dtype in PRECISIONS:
        terms = terms_of(name, tokens, settings[name], dtype)
        assert_trained_equal(terms.coefficients_L, expected.coefficients, tokens)
        assert_trained_equal(terms.value_L, expected.values, tokens)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_token_weighs_and_whether_it_was_clipped_or_left_out(name: str) -> None:
    for tokens in (random_tokens(7), random_tokens(8, drift=0.1)):
        terms = terms_of(name, tokens, OTHERS[name])
        if name != "p3o":  # its coefficients contain a KL term too
            weighed = terms.weight_L.numpy() * tokens.advantages
            assert_trained_equal(terms.coefficients_L, weighed, tokens)
        unclipped = weighted_by(name, tokens, OTHERS[name])
        left_out = terms.excluded_L.numpy()
        assert left_out[~tokens.trained].all()
        changed = np.abs(terms.weight_L.numpy() - unclipped) > 1e-12
        assert (terms.clipped_L.numpy() == changed)[tokens.trained & ~left_out].all()
        assert not terms.clipped_L.numpy()[tokens.trained & left_out].any()
        assert (terms.weight_L.numpy() == 0)[tokens.trained & left_out].all()


def weighted_by(name: str, tokens: Tokens, settings: Any) -> np.ndarray:
    """What would multiply the advantage if nothing were clipped."""
    ratios = np.array(tokens.ratios)
    if name == "minpro":
        return np.array(prefix_minima(tokens)) * ratios
    if name == "shuffled_minpro":
        (seen,) = surveyed(name, [tokens.for_objective(torch.float64)], settings)
        assert seen.surveyed_L is not None
        return seen.surveyed_L.numpy() * ratios
    if name in ("prefix_ratio", "ctpo"):
        limit = getattr(settings, "log_clamp", None) or 20.0
        return np.exp(np.clip(loops.log_products(tokens), -limit, limit))
    if name == "gspo" or (name == "sat" and settings.ratio == "sequence"):
        for place in tokens.trained_of_sequences():
            ratios[place] = np.exp(np.mean(np.array(tokens.log_ratios)[place]))
    if name in ("pnpo", "ctpo_geomean"):
        return np.exp(loops.log_prefix_means(tokens))
    if name == "vespo":
        return np.array(loops.vespo_weights(tokens, settings))
    if name == "sapo":
        tau = np.where(tokens.advantages > 0, settings.temperature_positive, settings.temperature_negative)
        return ratios / np.cosh(np.minimum(tau * (ratios - 1), 700) / 2) ** 2
    return ratios


# ---- single cases


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "coefficient"),
    [
        (1.1, 2.0, 2.2, 2.2),  # inside
        (1.5, 2.0, 2.56, 0.0),  # above 1.28 with A > 0: no gradient
        (0.5, 2.0, 1.0, 1.0),  # below 0.8 with A > 0: the pessimistic side keeps its gradient
        (0.5, -2.0, -1.6, 0.0),
        (1.5, -2.0, -3.0, -3.0),
        (30.0, -2.0, -20.0, 0.0),  # dual clip at 10
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_grpo_case_by_case(ratio: float, advantage: float, objective: float, coefficient: float) -> None:
    terms = terms_of("grpo", one_sequence([ratio], advantage), DEFAULTS["grpo"])
    assert float(terms.value_L) == pytest.approx(-objective, rel=1e-12)
    assert float(terms.coefficients_L) == pytest.approx(coefficient, rel=1e-12)
    assert bool(terms.clipped_L) == (coefficient == 0 and advantage != 0)


def test_minpro_of_the_five_ratios() -> None:
    tokens = one_sequence(FIVE_RATIOS)
    minima = tokens.for_objective(torch.float64).prefix_minimum_L
    np.testing.assert_allclose(minima, [1, 1.5, 0.5, 0.5, 0.5], rtol=1e-12, atol=0)
    weights = terms_of("minpro", tokens, DEFAULTS["minpro"]).weight_L
    np.testing.assert_allclose(weights, [1.5, 0.75, 1, 5, 0.5], rtol=1e-12, atol=0)


def test_the_prefix_minimum_may_exceed_one_and_skips_masked_tokens() -> None:
    tokens = one_sequence([0.1, 3.0, 0.2, 2.0, 5.0], mask=[0, 1, 0, 1, 1])
    minima = tokens.for_objective(torch.float64).prefix_minimum_L
    np.testing.assert_allclose(minima, [1, 1, 3, 3, 2], rtol=1e-12, atol=0)


def test_ctpo_of_three_tokens_by_hand() -> None:
    # products 1.04, .9984, 1.098; bounds exp(.05 sqrt t) = 1.0513, 1.0733, 1.0905
    tokens = one_sequence([1.04, 0.96, 1.1], advantage=2.0)
    terms = terms_of("ctpo", tokens, DEFAULTS["ctpo"])
    np.testing.assert_allclose(terms.coefficients_L, [2.08, 1.9968, 0], rtol=1e-12, atol=0)
    assert float(terms.value_L[2]) == pytest.approx(-2 * math.exp(0.05 * 3**0.5), rel=1e-12)


def test_ctpos_geometric_mean_of_three_tokens_by_hand() -> None:
    # means 1.04, .9992, 1.0317; bounds exp(.05 / sqrt t) = 1.0513, 1.0360, 1.0293
    terms = terms_of("ctpo_geomean", one_sequence([1.04, 0.96, 1.1], advantage=2.0), DEFAULTS["ctpo_geomean"])
    np.testing.assert_allclose(terms.coefficients_L, [2.08, 2 * (1.04 * 0.96) ** 0.5, 0], rtol=1e-12, atol=0)
    assert float(terms.value_L[2]) == pytest.approx(-2 * math.exp(0.05 / 3**0.5), rel=1e-12)


def test_sapo_vespo_and_pnpo_by_hand() -> None:
    sapo = terms_of("sapo", one_sequence([0.5, 1.0, 2.0, 5.0]), config.SapoConfig())
    np.testing.assert_allclose(sapo.weight_L, [0.47, 1, 1.5729, 0.3533], atol=5e-5)
    for advantage, expected in ((1.0, 1.1204), (-1.0, 0.3398)):  # the product is .5
        vespo = terms_of("vespo", one_sequence([2.0, 9.0, 0.25], advantage, mask=[1, 0, 1]), config.VespoConfig())
        np.testing.assert_allclose(vespo.weight_L[[0, 2]], expected, atol=5e-5)
    pnpo = terms_of("pnpo", one_sequence([1.5, 0.5, 9.0, 2.0], mask=[1, 1, 0, 1]), config.PnpoConfig())
    np.testing.assert_allclose(pnpo.weight_L[[0, 1, 3]], [1.5, 0.8660, 1.1447], atol=5e-5)


def test_gspo_of_two_sequences_by_hand() -> None:
    # geometric means: sqrt(1.21 / 1.21) = 1, inside; sqrt(1.1 * 1.1) = 1.1, beyond 1.002
    tokens = one_sequence([1.21, 1 / 1.21, 1.1, 9.0, 1.1], advantage=2.0, mask=[1, 1, 1, 0, 1])
    terms = terms_of("gspo", replace(tokens, sequence=np.array([0, 0, 1, 1, 1])), DEFAULTS["gspo"])
    assert terms.coefficients_L.numpy()[[0, 1, 2, 4]].tolist() == pytest.approx([2.0, 2.0, 0.0, 0.0])
    assert terms.value_L.numpy()[[0, 1, 2, 4]].tolist() == pytest.approx([-2.0, -2.0, -2.004, -2.004])


# (name, log of the bound's ratio for the first token, its advantage, whether beyond means above)
BOUNDS = [
    ("grpo", math.log(1.28), 1.0, True),
    ("grpo", math.log(0.8), -1.0, False),
    ("grpo", math.log(10.0), -1.0, True),
    ("gspo", math.log(1.002), 1.0, True),
    ("gspo", math.log(0.998), -1.0, False),
    ("ctpo", 0.05, 1.0, True),
    ("ctpo", -0.025, -1.0, False),
    ("ctpo", 0.05, -1.0, True),
]


@pytest.mark.parametrize(("name", "bound", "advantage", "above"), BOUNDS)
@pytest.mark.parametrize("closeness", [1e-6, 1e-9])
def test_the_gradient_ends_at_the_bound(
    name: str, bound: float, advantage: float, above: bool, closeness: float
) -> None:
    for step in (-closeness, closeness):
        tokens = one_sequence([math.exp(bound + step)], advantage)
        terms = terms_of(name, tokens, DEFAULTS[name])
        beyond = (step > 0) == above
        expected = 0.0 if beyond else advantage * math.exp(bound + step)
        assert float(terms.coefficients_L) == pytest.approx(expected, rel=1e-11, abs=0)
        assert bool(terms.clipped_L) == beyond


@pytest.mark.parametrize("name", ["grpo", "gspo", "ctpo"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_on_the_bound_keeps_its_gradient(name: str, advantage: float) -> None:
    settings = {  # 1 + clip_high and 1 - clip_low are 1: the ratio of an unchanged policy lies on both bounds
        "grpo": config.GrpoConfig(clip_low=0, clip_high=0),
        "gspo": config.GspoConfig(clip_low=0, clip_high=0),
        "ctpo": config.CtpoConfig(log_clip_low=0, log_clip_high=0, log_dual_clip=0),
    }
    terms = terms_of(name, one_sequence([1.0, 1.0], advantage), settings[name])
    assert terms.coefficients_L.tolist() == [advantage, advantage]
    assert not terms.clipped_L.any()


@pytest.mark.parametrize("name", ["minpro", "cispo", "prefix_ratio", "prefix_filter", "scaled_cispo"])
def test_weights_beyond_the_clip_keep_the_clips_gradient(name: str) -> None:
    for ratio, weight in ((7.0, 1.5), (0.01, 0.6)):
        settings = DEFAULTS[name].model_copy(update={"clip_low": 0.4, "clip_high": 0.5})
        terms = terms_of(name, one_sequence([ratio], advantage=-2.0), settings)
        assert float(terms.coefficients_L) == pytest.approx(-2.0 * weight, rel=1e-12)
        assert bool(terms.clipped_L)


def test_p3o_by_hand() -> None:
    terms = terms_of("p3o", one_sequence([0.5, 9.0, 1.0, 2.0], advantage=2.0, mask=[1, 0, 1, 1]), config.P3oConfig())
    share = 3.5**2 / (3 * 5.25)
    np.testing.assert_allclose(terms.weight_L[[0, 2, 3]], [0.5, share, share], rtol=1e-12)
    assert terms.clipped_L[[0, 2, 3]].tolist() == [False, True, True]
    slopes = np.array([1 - 2.0, 0.0, 1 - 0.5])  # of the KL estimate
    expected = 2 * np.array([0.5, share, share]) - (1 - share) * slopes
    np.testing.assert_allclose(terms.coefficients_L[[0, 2, 3]], expected, rtol=1e-12)
    one = one_sequence([2.0, 2.0, 2.0])  # equal ratios count fully, but the cap is 1
    assert terms_of("p3o", one, config.P3oConfig()).coefficients_L.tolist() == [1.0] * 3


def test_sat_by_hand() -> None:
    tokens = one_sequence(np.exp([0.1] * 8 + [0.12, 9.0, 0.15]).tolist(), mask=[1] * 9 + [0, 1])
    terms = terms_of("sat", tokens, config.SatConfig())  # the 0.9 quantile of ten numbers is the ninth
    assert terms.clipped_L.tolist() == [False] * 9 + [False, True]
    assert float(terms.value_L[-1]) == pytest.approx(-(1 + 0.2 / (1 + (0.15 / 0.12) ** 2)), rel=1e-12)
    assert not terms_of("sat", replace(tokens, advantages=-tokens.advantages), config.SatConfig()).clipped_L.any()
    down = replace(tokens, log_probs=-tokens.log_probs, advantages=-tokens.advantages)  # the other bound contracts
    found = terms_of("sat", down, config.SatConfig())
    assert float(found.value_L[-1]) == pytest.approx(1 - 0.2 / (1 + (0.15 / 0.12) ** 2), rel=1e-12)
    twice = replace(one_sequence([1.0, 1.3, 1.0, 1.1, 1.1]), sequence=np.array([0, 0, 0, 1, 1]))
    found = terms_of("sat", twice, config.SatConfig(ratio="sequence", quantile=0.5))  # q is the smaller mean
    bound = 1 + 0.2 / (1 + (3 * math.log(1.1) / math.log(1.3)) ** 2)
    np.testing.assert_allclose(found.value_L, [-(1.3 ** (1 / 3))] * 3 + [-bound] * 2, rtol=1e-12)


def test_wrong_versions_of_sat_are_far_from_the_loop() -> None:
    """A clip that never contracts, one that contracts at every token, and a quantile of each half of the mini-batch."""
    tokens, settings = random_tokens(19, num_sequences=40, drift=0.08), config.SatConfig()
    expected = np.array(LOOPS["sat"](tokens, settings).coefficients)
    assert_trained_equal(terms_of("sat", tokens, settings).coefficients_L, expected, tokens)
    factors = loops.sat_contractions(tokens, settings)
    assert sum(factor < 1 for factor in np.array(factors)[tokens.trained]) == tokens.trained.sum() // 10
    halves = np.zeros(len(tokens.mask))
    for half in (0, 1):
        places = np.flatnonzero(tokens.sequence % 2 == half)
        halves[places] = terms_of("sat", tokens.where(places), settings).coefficients_L.numpy()
    plain = terms_of("grpo", tokens, config.GrpoConfig(clip_low=0.2, clip_high=0.2)).coefficients_L.numpy()
    always = terms_of("sat", tokens, settings.model_copy(update={"quantile": 1e-9})).coefficients_L.numpy()
    for wrong in (halves, plain, always):
        assert np.abs(wrong - expected)[tokens.trained].max() > 0.1


def test_wrong_versions_of_smooth_weights_are_far_from_the_loop() -> None:
    """Scans that run on into the next sequence, and temperatures that are exchanged."""
    tokens = random_tokens(7, drift=0.2)
    joined = replace(tokens, sequence=np.zeros_like(tokens.sequence))
    exchanged = config.SapoConfig(temperature_positive=2.0, temperature_negative=0.7)
    wrong = {name: terms_of(name, joined, OTHERS[name]) for name in ("vespo", "pnpo", "ctpo_geomean")}
    for name, terms in (wrong | {"sapo": terms_of("sapo", tokens, exchanged)}).items():
        expected = np.array(LOOPS[name](tokens, OTHERS[name]).coefficients)
        assert np.abs(terms.coefficients_L.numpy() - expected)[tokens.trained].max() > 0.1, name


# ---- relations between objectives


def test_with_prefix_factor_one_minpro_is_cispo_exactly() -> None:
    tokens = random_tokens(2)
    drift = np.abs(tokens.log_probs - tokens.behavior)  # all ratios >= 1 ...
    for trained in tokens.trained_of_sequences():
        drift[trained[0]] = 0  # ... and the first trained one is 1, so every prefix minimum is 1
    tokens = replace(tokens, behavior=tokens.log_probs - drift)
    ours, cispo = (terms_of(name, tokens, DEFAULTS[name], torch.float32) for name in ("minpro", "cispo"))
    for field in vars(cispo):
        assert torch.equal(getattr(ours, field)[tokens.trained], getattr(cispo, field)[tokens.trained]), field
    assert ours.weight_L[tokens.trained].max() > 2


def test_prefix_filter_is_cispo_where_it_leaves_nothing_out_and_scaled_cispo_everywhere() -> None:
    tokens = random_tokens(14)
    cispo = terms_of("cispo", tokens, DEFAULTS["cispo"])
    filtered = terms_of("prefix_filter", tokens, DEFAULTS["prefix_filter"])
    kept = ~filtered.excluded_L
    assert 0 < int((~kept)[tokens.trained].sum()) < 5
    assert torch.equal(filtered.coefficients_L[kept], cispo.coefficients_L[kept])
    scaled = terms_of("scaled_cispo", tokens, DEFAULTS["scaled_cispo"])
    assert all(torch.equal(getattr(scaled, field), getattr(cispo, field)) for field in vars(cispo))


def test_scaled_cispo_scales_the_learning_rate_by_the_mean_prefix_minimum() -> None:
    factors = {name: objective.learning_rate_factor for name, objective in OBJECTIVES.items()}
    assert factors == dict.fromkeys(OBJECTIVES) | {"scaled_cispo": "prefix_min/mean"}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_with_all_ratios_one_the_gradient_is_reinforces(name: str, aggregation: str) -> None:
    """Every weight is 1 then: prefix minima and products of ones, a geometric mean of ones (of which a token's share,
    1/n, is what GSPO's coefficient leaves to sequence-mean), no harmful token, no product below the quantile."""
    tokens = random_tokens(11)
    random = np.random.default_rng(3)
    logits = torch.tensor(random.normal(0, 2, (len(tokens.mask), 7)), requires_grad=True)
    actions = torch.tensor(random.integers(0, 7, (len(tokens.mask), 1)))
    weights = torch.tensor(token_weights(tokens, aggregation))

    log_probs = logits.log_softmax(-1).gather(1, actions)[:, 0]
    scan = WholeSequenceScan(torch.tensor(tokens.sequence), torch.tensor(tokens.mask))
    advantages = torch.tensor(tokens.advantages).double()
    ids = torch.arange(len(tokens.mask))
    (seen,) = surveyed(
        name,
        [policy_tokens(log_probs, log_probs.detach(), advantages, torch.tensor(tokens.mask), scan, ids)],
        DEFAULTS[name],
    )
    loss = summed_loss(log_probs, OBJECTIVES[name].terms(seen, DEFAULTS[name]), weights)
    (found,) = torch.autograd.grad(loss, logits)

    log_probs = logits.log_softmax(-1).gather(1, actions)[:, 0]
    (expected,) = torch.autograd.grad(-(weights * advantages * log_probs).sum(), logits)
    assert expected.abs().max() > 0.1 * weights.max()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_gspos_gradient_is_that_of_its_sequence_objectives() -> None:
    """With sequence-mean the gradient is that of the sequences' objectives; with token-mean each counts n times."""
    tokens, settings = random_tokens(15, drift=0.05), config.GspoConfig(clip_low=0.02, clip_high=0.02)
    terms = terms_of("gspo", tokens, settings)
    for aggregation in ("token_mean", "sequence_mean"):
        weights = torch.tensor(token_weights(tokens, aggregation))
        log_probs = torch.tensor(tokens.log_probs).double().requires_grad_()
        (found,) = torch.autograd.grad(summed_loss(log_probs, terms, weights), log_probs)
        loss = torch.zeros((), dtype=torch.float64)
        for trained in tokens.trained_of_sequences():
            mean_log_ratio = (log_probs[trained] - torch.tensor(tokens.behavior[trained])).mean()
            advantage = loops.advantages(tokens, trained[:1])[0]
            objective = loops.ppo(mean_log_ratio.exp(), advantage, 0.98, 1.02)
            loss = loss - objective * (len(trained) if aggregation == "token_mean" else 1)
        (expected,) = torch.autograd.grad(loss, log_probs)
        assert 0 < int((expected[tokens.trained] == 0).sum()) < tokens.trained.sum()
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def token_weights(tokens: Tokens, aggregation: str) -> np.ndarray:
    """1 for each trained token, or 1 / trained tokens of its sequence."""
    weights = np.zeros(len(tokens.mask))
    for trained in tokens.trained_of_sequences():
        weights[trained] = 1.0 if aggregation == "token_mean" else 1.0 / len(trained)
    return weights


# ---- the loss made of the terms


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_has_the_terms_value_and_minus_coefficient_times_weight_as_gradient(name: str) -> None:
    tokens = random_tokens(7)
    terms = terms_of(name, tokens, DEFAULTS[name])
    weights = torch.tensor(token_weights(tokens, "sequence_mean"))
    log_probs = torch.tensor(tokens.log_probs).double().requires_grad_()
    loss = summed_loss(log_probs, terms, weights)
    loss.backward()
    assert log_probs.grad is not None
    np.testing.assert_allclose(log_probs.grad, -terms.coefficients_L * weights, rtol=1e-14, atol=0)
    expected = sum(float(v) * float(w) for v, w in zip(terms.value_L, weights, strict=True))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_keep_no_gradient(name: str) -> None:
    log_probs = torch.tensor([-0.5, -1.0, -0.2], requires_grad=True)
    mask = torch.ones(3)
    scan = WholeSequenceScan(torch.zeros(3, dtype=torch.int64), mask)
    tokens = policy_tokens(log_probs, torch.zeros(3), torch.ones(3), mask, scan, torch.arange(3))
    (tokens,) = surveyed(name, [tokens], DEFAULTS[name])
    terms = OBJECTIVES[name].terms(tokens, DEFAULTS[name])
    assert not any(value.requires_grad for value in vars(terms).values())


# ---- bad input


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, -1e4], ids=str)
def test_masked_tokens_change_nothing(name: str, wild: float) -> None:
    tokens, settings = random_tokens(13), DEFAULTS[name]
    masked = ~tokens.trained
    filled = replace(
        tokens,
        log_probs=np.where(masked, wild, tokens.log_probs).astype(np.float32),
        behavior=np.where(masked, -wild, tokens.behavior).astype(np.float32),
    )
    assert not filled.for_objective(torch.float32).log_ratio_L[masked].any()
    expected = terms_of(name, tokens, settings)
    for other, keep in ((filled, tokens.trained), (tokens.where(tokens.trained), slice(None))):
        terms = terms_of(name, other, settings)
        for field in vars(expected):
            assert torch.equal(getattr(terms, field)[keep], getattr(expected, field)[tokens.trained]), field
    weights = torch.tensor(tokens.mask).double()
    losses = []
    for one in (filled, tokens):
        log_probs = torch.tensor(one.log_probs).double().requires_grad_()
        loss = summed_loss(log_probs, terms_of(name, one, settings), weights)
        loss.backward()
        assert log_probs.grad is not None
        assert torch.equal(log_probs.grad[masked], torch.zeros(int(masked.sum())).double())
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def with_value(tokens: Tokens, field: str, place: int, value: float) -> Tokens:
    values = getattr(tokens, field).copy()
    values[place] = value
    return replace(tokens, **{field: values})


def loss_and_gradient(terms: ObjectiveTerms, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_probs = torch.tensor(tokens.log_probs).double().requires_grad_()
    loss = summed_loss(log_probs, terms, torch.tensor(tokens.mask).double())
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient, summed_value(terms, torch.tensor(tokens.mask).double())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("field", ["log_probs", "behavior"])
@pytest.mark.parametrize("advantage", [1.7, 0.0, -1.3])
def test_a_nan_in_a_trained_token_shows(name: str, field: str, advantage: float) -> None:
    tokens = random_tokens(16)
    place = int(np.flatnonzero(tokens.trained)[20])
    advantages = np.where(tokens.sequence == tokens.sequence[place], np.float32(advantage), tokens.advantages)
    tokens = with_value(replace(tokens, advantages=advantages), field, place, math.nan)
    loss, gradient, value = loss_and_gradient(terms_of(name, tokens, DEFAULTS[name]), tokens)
    assert loss.isnan()
    assert value.isnan()
    assert gradient[place].isnan()


@pytest.mark.parametrize("name", ["minpro", "prefix_ratio", "ctpo"])
def test_a_nan_reaches_the_later_tokens_of_its_sequence_only(name: str) -> None:
    tokens = replace(one_sequence([1.1] * 6), sequence=np.array([0, 0, 0, 0, 1, 1]))
    terms = terms_of(name, with_value(tokens, "log_probs", 1, math.nan), DEFAULTS[name])
    assert terms.coefficients_L.isnan().tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_infinite_log_prob_counts_as_a_log_ratio_of_twenty(name: str) -> None:
    tokens = random_tokens(17)
    place = int(np.flatnonzero(tokens.trained)[20])
    for field, sign in (("log_probs", -1), ("behavior", 1)):
        infinite = with_value(tokens, field, place, -math.inf)
        far = with_value(tokens, field, place, getattr(tokens, field)[place] - 40.0)
        terms, expected = (terms_of(name, one, DEFAULTS[name]) for one in (infinite, far))
        assert float(infinite.for_objective(torch.float32).log_ratio_L[place]) == sign * 20
        assert torch.equal(terms.coefficients_L, expected.coefficients_L)
        assert terms.coefficients_L[tokens.trained].isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_log_ratios_beyond_twenty_stay_finite(name: str) -> None:
    tokens = replace(
        one_sequence([1.0] * 4),
        log_probs=np.array([-60.0, -0.1, -0.1, -60.0]),
        behavior=np.array([-0.1, -60.0, -60.0, -0.1]),
    )
    assert tokens.for_objective(torch.float32).log_ratio_L.tolist() == [-20, 20, 20, -20]
    for advantage in (1.7, -1.3):
        scaled = replace(tokens, advantages=tokens.advantages * advantage)
        terms = terms_of(name, scaled, DEFAULTS[name], torch.float32)
        for field in ("coefficients_L", "value_L", "weight_L"):
            assert getattr(terms, field).isfinite().all(), field


@pytest.mark.parametrize("name", OBJECTIVES)
def test_where_no_token_is_trained_there_are_only_zeros(name: str) -> None:
    tokens = random_tokens(18)
    nothing = replace(tokens, mask=np.zeros_like(tokens.mask))
    for one in (nothing, tokens.where(np.zeros(len(tokens.mask), bool))):
        loss, gradient, value = loss_and_gradient(terms_of(name, one, DEFAULTS[name]), one)
        assert float(loss) == float(value) == 0
        assert not gradient.any()


@pytest.mark.parametrize("clips", [(1.0, 4.0), (0.3, 0.2)], ids=str)
def test_both_ends_of_the_clip_hold(clips: tuple[float, float]) -> None:
    settings = config.MinproConfig(clip_low=clips[0], clip_high=clips[1])
    tokens = random_tokens(5, drift=2.0)
    raw = loops.minpro_weights(tokens)
    assert max(raw) > 1 + clips[1]
    weights = terms_of("minpro", tokens, settings).weight_L
    assert_trained_equal(weights, [clip(w, 1 - clips[0], 1 + clips[1]) for w in raw], tokens)
