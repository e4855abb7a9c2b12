"""What is switched on around an objective equals a float64 loop, alone and together, for every objective."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from minpro_megatron.config.loss import (
    DecoupledConfig,
    IcePopConfig,
    KlConfig,
    LossConfig,
    OffPolicyMaskingConfig,
    RejectionConfig,
    SequenceImportanceConfig,
    TruncatedImportanceConfig,
)
from minpro_megatron.config.objective import GrpoConfig, MinproConfig
from minpro_megatron.metrics import metric
from minpro_megatron.metrics.declared import METRICS
from minpro_megatron.objective.correction_statistics import correction_statistics
from minpro_megatron.objective.corrections import Effects, OtherLogProbs, corrected, kl_estimate
from minpro_megatron.objective.mean_statistics import MeanStatistics, as_metrics
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import ObjectiveTerms, summed_loss
from tests.support import objective_loops as loops
from tests.support.objective_loops import Expected, OtherNumbers
from tests.support.ragged_tokens import DEFAULTS, Tokens, far_tokens, random_tokens, terms_of

TOLERANCE = 1e-11
Switches = dict[str, Any]  # what LossConfig is made of
TRUNCATED: Switches = {"truncated_importance": TruncatedImportanceConfig(enabled=True)}
ICEPOP: Switches = {"icepop": IcePopConfig(enabled=True)}
DECOUPLED: Switches = {"decoupled": DecoupledConfig(enabled=True)}
KL: dict[str, Switches] = {
    f"kl {name}": {"kl": KlConfig(enabled=True, estimator=name, coefficient=0.3)} for name in ("k1", "k2", "k3")
}
SEQUENCE: Switches = {"sequence_importance": SequenceImportanceConfig(enabled=True)}
OFF_POLICY: Switches = {"off_policy_masking": OffPolicyMaskingConfig(enabled=True, largest_mean_log_ratio=0.1)}
# bounds that keep some of the random tokens' sequences and reject others
BOUNDS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("token", "k1"): (-0.5, 1.0),
    ("token", "k2"): (None, 0.3),
    ("token", "k3"): (None, 0.3),
    ("sum", "k1"): (-1.0, 1.0),
    ("sum", "k2"): (0.5, 4.0),
    ("sum", "k3"): (None, 4.0),
    ("mean", "k1"): (-0.2, None),
    ("mean", "k2"): (None, 0.3),
    ("mean", "k3"): (0.1, 0.4),
    ("max", "k1"): (0.5, 1.5),
    ("max", "k2"): (None, 1.2),
    ("max", "k3"): (None, 1.5),
}
REJECTIONS: dict[str, Switches] = {
    f"rejection, {statistic} of {estimator}": {
        "rejection": RejectionConfig.model_validate(
            {"enabled": True, "statistic": statistic, "estimator": estimator, "low": low, "high": high}
        )
    }
    for (statistic, estimator), (low, high) in BOUNDS.items()
}
SWITCHES: dict[str, Switches] = {
    "nothing": {},
    "truncated importance": TRUNCATED,
    "icepop": ICEPOP,
    "decoupled": DECOUPLED,
    **KL,
    "truncated, low cap": {"truncated_importance": TruncatedImportanceConfig(enabled=True, cap=0.7)},
    "narrow icepop, truncated": TRUNCATED | {"icepop": IcePopConfig(enabled=True, low=0.9, high=1.2)},
    "decoupled, low limit": {"decoupled": DecoupledConfig(enabled=True, largest_weight=0.9)},
    "sequence importance": SEQUENCE,
    "sequence importance, low cap": {"sequence_importance": SequenceImportanceConfig(enabled=True, cap=0.7)},
    **REJECTIONS,
    "off-policy masking": OFF_POLICY,
    "everything": TRUNCATED | ICEPOP | REJECTIONS["rejection, max of k2"] | OFF_POLICY | DECOUPLED | KL["kl k3"],
    "everything of sequences": SEQUENCE | REJECTIONS["rejection, mean of k3"] | OFF_POLICY | DECOUPLED | KL["kl k3"],
}


def others_of(tokens: Tokens, seed: int, drift: float = 0.8) -> OtherNumbers:
    random = np.random.default_rng(seed)
    shifts = random.normal(0, drift, (3, len(tokens.mask)))
    return OtherNumbers(*(tokens.behavior + shifts).astype(np.float32))


def found_terms(
    name: str, tokens: Tokens, others: OtherNumbers, loss: LossConfig, dtype: torch.dtype = torch.float32
) -> ObjectiveTerms:
    """As the loss has it: the objective on its denominator, then the corrections."""
    behavior, rollout, proximal, reference = (
        torch.tensor(values, dtype=dtype)
        for values in (tokens.behavior, others.rollout, others.proximal, others.reference)
    )
    given = OtherLogProbs(behavior, rollout, proximal, reference)
    against = replace(tokens, behavior=given.denominator(loss).numpy())
    terms = terms_of(name, against, DEFAULTS[name], dtype)
    return corrected(terms, against.for_objective(dtype), given, loss)[0]


def expected_terms(tokens: Tokens, others: OtherNumbers, loss: LossConfig) -> Expected:
    """MinPRO's."""
    old = others.proximal if loss.decoupled.enabled else tokens.behavior
    against = replace(tokens, behavior=old)
    plain = loops.weighted(against, loops.minpro_weights(against), 1.0, 4.0)
    return loops.corrected(plain, tokens, others, loss)


def assert_equal(found: ObjectiveTerms, expected: Expected, tokens: Tokens) -> None:
    for values, of in ((found.coefficients_L, expected.coefficients), (found.value_L, expected.values)):
        np.testing.assert_allclose(
            values.numpy()[tokens.trained], np.array(of)[tokens.trained], rtol=TOLERANCE, atol=TOLERANCE
        )


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("kind", ["ragged", "far"])
def test_corrections_equal_the_loop(switches: str, kind: str) -> None:
    tokens = {"ragged": random_tokens, "far": far_tokens}[kind](51)
    others, loss = others_of(tokens, 52, drift=20.0 if kind == "far" else 0.8), LossConfig(**SWITCHES[switches])
    expected = expected_terms(tokens, others, loss)
    for dtype in (torch.float32, torch.float64):
        assert_equal(found_terms("minpro", tokens, others, loss, dtype), expected, tokens)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    "switches", ["truncated importance", "icepop", "everything", "off-policy masking", "everything of sequences"]
)
def test_corrections_work_around_every_objective(name: str, switches: str) -> None:
    tokens, loss = random_tokens(53), LossConfig(**SWITCHES[switches])
    others = others_of(tokens, 54)
    old = others.proximal if loss.decoupled.enabled else tokens.behavior
    plain = terms_of(name, replace(tokens, behavior=old), DEFAULTS[name])
    expected = Expected(plain.coefficients_L.tolist(), plain.value_L.tolist())
    assert_equal(found_terms(name, tokens, others, loss), loops.corrected(expected, tokens, others, loss), tokens)


@pytest.mark.parametrize("switches", SWITCHES)
def test_left_out_tokens_are_those_beyond_the_limits(switches: str) -> None:
    tokens, loss = random_tokens(55), LossConfig(**SWITCHES[switches])
    others = others_of(tokens, 56)
    terms = found_terms("minpro", tokens, others, loss)
    old = others.proximal if loss.decoupled.enabled else tokens.behavior
    plain = terms_of("minpro", replace(tokens, behavior=old), DEFAULTS["minpro"])
    for place in np.flatnonzero(tokens.trained).tolist():
        ratio = loops.between(float(tokens.behavior[place]), float(others.rollout[place]))
        weight = loops.between(float(others.proximal[place]), float(tokens.behavior[place]))
        outside = loss.icepop.enabled and not loss.icepop.low <= ratio <= loss.icepop.high
        outside = outside or loops.sequence_factors(tokens, others, loss)[place] == 0
        too_heavy = loss.decoupled.enabled and weight > loss.decoupled.largest_weight
        assert bool(terms.excluded_L[place]) == (outside or too_heavy)
        assert not terms.excluded_L[place] or not terms.clipped_L[place]
        assert terms.weight_L[place] == (0 if terms.excluded_L[place] else plain.weight_L[place])  # the objective's own


def test_nothing_switched_on_is_the_objective_itself() -> None:
    tokens = random_tokens(57)
    terms = terms_of("minpro", tokens, MinproConfig())
    anything = torch.full((len(tokens.mask),), math.nan)
    others = OtherLogProbs(anything, anything, anything, anything)
    found, effects = corrected(terms, tokens.for_objective(torch.float32), others, LossConfig())
    assert found is terms
    assert effects == Effects()


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(0.5 + 1e-9, 0.5), (0.5 - 1e-9, 0.0), (1.7, 1.7), (5 - 1e-9, 5.0), (5 + 1e-9, 0.0), (1e9, 0.0)],
)
def test_icepop_case_by_case(ratio: float, factor: float) -> None:
    assert ratio_factor(ratio, LossConfig(**ICEPOP)) == pytest.approx(factor, rel=1e-8)


def test_icepops_limits_belong_to_what_is_kept() -> None:
    assert ratio_factor(1.0, LossConfig(icepop=IcePopConfig(enabled=True, low=1.0, high=1.0))) == 1.0


@pytest.mark.parametrize(("ratio", "factor"), [(0.001, 0.001), (1.9, 1.9), (2.0, 2.0), (2.1, 2.0), (1e9, 2.0)])
def test_truncated_importance_case_by_case(ratio: float, factor: float) -> None:
    assert ratio_factor(ratio, LossConfig(**TRUNCATED)) == pytest.approx(factor, rel=1e-12)


def test_the_decoupled_limit_belongs_to_what_is_kept() -> None:
    tokens, loss = random_tokens(50), LossConfig(decoupled=DecoupledConfig(enabled=True, largest_weight=1.0))
    others = replace(others_of(tokens, 50), proximal=tokens.behavior)
    plain = terms_of("cispo", tokens, DEFAULTS["cispo"])
    assert torch.equal(found_terms("cispo", tokens, others, loss).coefficients_L, plain.coefficients_L)


def ratio_factor(ratio: float, loss: LossConfig) -> float:
    """What a token's coefficient is multiplied by if the trainer's probability is `ratio` times the server's."""
    tokens = Tokens(np.array([-1.0]), np.array([-1.0]), np.ones(1), np.ones(1), np.zeros(1, np.int64))
    others = OtherNumbers(tokens.behavior - math.log(ratio), tokens.behavior, tokens.behavior)
    return float(found_terms("cispo", tokens, others, loss, torch.float64).coefficients_L)


def test_decoupled_grpo_is_the_papers_objective() -> None:
    """arXiv:2505.24298, equation 5: pi_proximal / pi_behavior times PPO's objective in pi / pi_proximal."""
    tokens, loss = random_tokens(58), LossConfig(decoupled=DecoupledConfig(enabled=True, largest_weight=1e9))
    others = others_of(tokens, 59)
    trained = np.flatnonzero(tokens.trained).tolist()
    proximal, behavior = (torch.tensor(x[trained]).double() for x in (others.proximal, tokens.behavior))
    log_probs = torch.tensor(tokens.log_probs[trained]).double().requires_grad_()
    objective = loops.ppo((log_probs - proximal).exp(), loops.advantages(tokens, trained), 0.8, 1.28, 10.0)
    (expected,) = torch.autograd.grad(((proximal - behavior).exp() * objective).sum(), log_probs)
    found = found_terms("grpo", tokens, others, loss).coefficients_L
    assert GrpoConfig() == DEFAULTS["grpo"]
    np.testing.assert_allclose(found[trained], expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_decoupled_with_an_unchanged_proximal_policy_is_importance_sampling(name: str) -> None:
    """In a step's first update pi = pi_proximal: every objective weighs a token by pi_proximal / pi_behavior alone."""
    tokens, loss = random_tokens(60), LossConfig(decoupled=DecoupledConfig(enabled=True, largest_weight=1e9))
    others = replace(others_of(tokens, 61), proximal=tokens.log_probs)
    found = found_terms(name, tokens, others, loss).coefficients_L.numpy()
    expected = np.array(tokens.ratios) * tokens.advantages
    np.testing.assert_allclose(found[tokens.trained], expected[tokens.trained], rtol=TOLERANCE, atol=TOLERANCE)


# ---- whole sequences


@pytest.mark.parametrize("switches", [*REJECTIONS, "off-policy masking", "sequence importance, low cap"])
def test_the_random_sequences_are_on_both_sides_of_every_bound(switches: str) -> None:
    """So that the comparisons with the loop above compare something."""
    tokens, loss = random_tokens(51), LossConfig(**SWITCHES[switches])
    factors = np.array(loops.sequence_factors(tokens, others_of(tokens, 52), loss))[tokens.trained]
    assert len(set(factors.tolist())) > 1
    assert factors.min() == 0 or factors.max() == loss.sequence_importance.cap


def test_a_sequence_weighs_the_product_of_its_ratios() -> None:
    """d = log trainer - log server = (.5, .2, .4) and (.1, -.3); the fourth token is given, not sampled."""
    given = Tokens(
        np.full(6, -1.0),
        np.array([-1.0, -1.2, -1.5, -9.0, -2.0, -2.1]),
        np.ones(6),
        np.array([1.0, 1, 1, 0, 1, 1]),
        np.array([0, 0, 0, 0, 1, 1]),
    )
    rollout = given.behavior - np.array([0.5, 0.2, 0.4, 7.0, 0.1, -0.3])
    others = OtherNumbers(rollout, given.behavior, given.behavior)
    plain = found_terms("cispo", given, others, LossConfig(), torch.float64).coefficients_L
    for cap, expected in ((5.0, [math.exp(1.1)] * 3 + [math.exp(-0.2)] * 2), (2.0, [2.0] * 3 + [math.exp(-0.2)] * 2)):
        loss = LossConfig(sequence_importance=SequenceImportanceConfig(enabled=True, cap=cap))
        found = found_terms("cispo", given, others, loss, torch.float64).coefficients_L / plain
        np.testing.assert_allclose(found[given.trained], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("advantage", "away", "is_masked"), [(-1.0, 0.11, True), (-1.0, 0.09, False), (1.0, 0.11, False), (0.0, 5.0, False)]
)
def test_off_policy_masking_case_by_case(advantage: float, away: float, is_masked: bool) -> None:
    """The mean of log(pi_server / pi) decides, whichever of drift and mismatch has caused it."""
    behavior = np.array([-1.0, -2.0])
    tokens = Tokens(behavior - away, behavior + 3, np.full(2, advantage), np.ones(2), np.zeros(2, np.int64))
    others = OtherNumbers(behavior + np.array([0.5, -0.5]), behavior, behavior)
    terms = found_terms("cispo", tokens, others, LossConfig(**OFF_POLICY), torch.float64)
    assert terms.excluded_L.tolist() == [is_masked] * 2


@pytest.mark.parametrize("switches", ["everything", "everything of sequences", *REJECTIONS, "off-policy masking"])
def test_given_tokens_in_the_middle_are_transparent(switches: str) -> None:
    """Tokens that the policy did not sample change nothing for the others, whatever numbers they carry."""
    tokens, loss = random_tokens(73), LossConfig(**SWITCHES[switches])
    others = others_of(tokens, 74)
    without = OtherNumbers(*(values[tokens.trained] for values in vars(others).values()))
    expected = found_terms("minpro", tokens.where(tokens.trained), without, loss)
    found = found_terms("minpro", tokens, others, loss)
    for name in ("coefficients_L", "value_L", "excluded_L"):
        np.testing.assert_allclose(
            getattr(found, name)[tokens.trained], getattr(expected, name), rtol=TOLERANCE, atol=TOLERANCE
        )


def test_what_corrections_did_is_counted() -> None:
    """Over trained tokens, and over sequences that have one; merged over micro-batches."""
    tokens, loss = random_tokens(75), LossConfig(**SWITCHES["everything of sequences"])
    others = others_of(tokens, 76)
    halves = [tokens.sequence < 6, tokens.sequence >= 6]
    parts = [effects_of(tokens, others, loss, where) for where in halves]
    found = metric.values(as_metrics(parts))
    rejected = np.array(loops.sequence_factors(tokens, others, LossConfig(rejection=loss.rejection))) == 0
    off_policy = np.array(loops.sequence_factors(tokens, others, LossConfig(**OFF_POLICY))) == 0
    firsts = [trained[0] for trained in tokens.trained_of_sequences()]
    pairs = list(zip(others.proximal, tokens.behavior, strict=True))
    weights = np.array([loops.between(new, old) for new, old in pairs])
    products = np.array(
        loops.sequence_factors(tokens, others, LossConfig(sequence_importance=loss.sequence_importance))
    )
    assert found == pytest.approx(
        {
            "corrections/weight_mean": (weights * products)[tokens.trained].mean(),
            "corrections/rejection_tokens": rejected[tokens.trained].mean(),
            "corrections/rejection_sequences": rejected[firsts].mean(),
            "corrections/off_policy_masking_tokens": off_policy[tokens.trained].mean(),
            "corrections/off_policy_masking_sequences": off_policy[firsts].mean(),
            "corrections/decoupled_tokens": (weights > loss.decoupled.largest_weight)[tokens.trained].mean(),
        },
        rel=1e-12,
    )
    assert 0 < found["corrections/rejection_sequences"] < 1
    assert set(found) <= set(METRICS)


def effects_of(tokens: Tokens, others: OtherNumbers, loss: LossConfig, where: np.ndarray) -> MeanStatistics:
    here, elsewhere = tokens.where(where), [values[where] for values in vars(others).values()]
    given = OtherLogProbs(*(torch.tensor(numbers) for numbers in (here.behavior, *elsewhere)))
    seen = here.for_objective(torch.float32)
    _, effects = corrected(OBJECTIVES["cispo"].terms(seen, DEFAULTS["cispo"]), seen, given, loss)
    found = correction_statistics(seen, effects)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rejection": {"low": None, "high": None}}, "low and high are both null"),
        ({"rejection": {"low": 1.0, "high": 0.5}}, "low = 1.0 must not exceed high = 0.5"),
        ({"off_policy_masking": {"enabled": True}}, "largest_mean_log_ratio is null"),
        (SEQUENCE | TRUNCATED, "sequence_importance and truncated_importance are both enabled"),
        (SEQUENCE | ICEPOP, "sequence_importance and icepop are both enabled"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Switches, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        LossConfig.model_validate(settings)


# ---- KL


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_estimate_and_its_derivative(estimator: str) -> None:
    differences = [0.0, -60.0, -20.0, -3.0, -1e-3, -1e-8, 1e-8, 1e-3, 0.5, 3.0, 20.0, 60.0]
    reference = np.full(len(differences), -2.0)
    log_probs = reference + differences
    value, slope = kl_estimate(torch.tensor(log_probs), torch.tensor(reference), estimator)
    expected_value, expected_slope = loops.kl(log_probs, reference, estimator)
    np.testing.assert_allclose(value, expected_value, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(slope, expected_slope, rtol=TOLERANCE, atol=TOLERANCE)
    assert value[0] == 0


def test_the_kl_estimates_and_their_gradients_mean_what_they_say() -> None:
    """Over a whole distribution: k1 and k3 have the mean KL(pi || ref); k2's gradient has the mean of KL's gradient."""
    random = np.random.default_rng(62)
    logits = torch.tensor(random.normal(0, 1, 9), requires_grad=True)
    reference = torch.tensor(random.normal(0, 1, 9)).log_softmax(0)
    log_probs = logits.log_softmax(0)
    divergence = (log_probs.exp() * (log_probs - reference)).sum()
    (gradient,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    probabilities = log_probs.detach().exp()
    for estimator in ("k1", "k3"):
        value, _ = kl_estimate(log_probs.detach(), reference, estimator)
        assert float((probabilities * value).sum()) == pytest.approx(float(divergence.detach()), rel=1e-12)
    _, slope = kl_estimate(log_probs.detach(), reference, "k2")
    (found,) = torch.autograd.grad((probabilities * slope * log_probs).sum(), logits)
    np.testing.assert_allclose(found, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", KL)
def test_the_loss_with_a_kl_penalty_has_its_gradient(estimator: str) -> None:
    tokens, loss = random_tokens(63), LossConfig(**KL[estimator])
    others = others_of(tokens, 64)
    terms = found_terms("minpro", tokens, others, loss)
    plain = terms_of("minpro", tokens, MinproConfig())
    weights = torch.tensor(tokens.mask).double()
    log_probs = torch.tensor(tokens.log_probs).double().requires_grad_()
    (found,) = torch.autograd.grad(summed_loss(log_probs, terms, weights), log_probs)
    d = log_probs - torch.tensor(others.reference)
    penalty = {"kl k1": d, "kl k2": d**2 / 2, "kl k3": (-d).exp() - 1 + d}[estimator]
    (expected,) = torch.autograd.grad((weights * (0.3 * penalty - plain.coefficients_L * log_probs)).sum(), log_probs)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_tokens_that_are_left_out_still_pay_the_kl_penalty() -> None:
    tokens = random_tokens(65)
    others, loss = others_of(tokens, 66, drift=3.0), LossConfig(**(ICEPOP | KL["kl k2"]))
    terms = found_terms("minpro", tokens, others, loss)
    left_out = tokens.trained & terms.excluded_L.numpy()
    assert left_out.sum() > 10
    slope = 0.3 * (tokens.log_probs.astype(np.float64) - others.reference)
    np.testing.assert_allclose(terms.coefficients_L.numpy()[left_out], -slope[left_out], rtol=1e-12)


# ---- bad input

USED = {
    "truncated importance": ["behavior", "rollout"],
    "icepop": ["behavior", "rollout"],
    "sequence importance": ["behavior", "rollout"],
    **{name: ["behavior", "rollout"] for name in REJECTIONS},
    "off-policy masking": ["rollout"],
    "decoupled": ["behavior", "proximal"],
    "kl k1": ["reference"],
    "kl k2": ["reference"],
    "kl k3": ["reference"],
}


def with_number(
    tokens: Tokens, others: OtherNumbers, field: str, where: np.ndarray, number: float
) -> tuple[Tokens, OtherNumbers]:
    if field == "behavior":
        return replace(tokens, behavior=np.where(where, np.float32(number), tokens.behavior)), others
    return tokens, replace(others, **{field: np.where(where, np.float32(number), getattr(others, field))})


@pytest.mark.parametrize(("switch", "field"), [(switch, field) for switch in USED for field in USED[switch]])
def test_nan_shows_in_trained_tokens_and_not_in_masked_ones(switch: str, field: str) -> None:
    tokens, loss = random_tokens(67), LossConfig(**SWITCHES[switch])
    others = others_of(tokens, 68)
    expected = found_terms("minpro", tokens, others, loss)
    place = int(np.flatnonzero(tokens.trained)[15])
    for number in (math.nan, math.inf, -math.inf):
        bad_tokens, bad_others = with_number(tokens, others, field, ~tokens.trained, number)
        masked = found_terms("minpro", bad_tokens, bad_others, loss)
        for values in vars(expected):
            found = getattr(masked, values)[tokens.trained]
            assert torch.equal(found, getattr(expected, values)[tokens.trained]), values
        log_probs, mask = torch.tensor(tokens.log_probs, requires_grad=True), torch.tensor(tokens.mask)
        loss_value = summed_loss(log_probs, masked, mask)
        (gradient,) = torch.autograd.grad(loss_value, log_probs)
        assert loss_value.isfinite()
        assert gradient.isfinite().all()
        here = np.arange(len(tokens.mask)) == place
        bad_tokens, bad_others = with_number(tokens, others, field, here, number)
        terms = found_terms("minpro", bad_tokens, bad_others, loss)
        bad = math.isnan(number)
        # k1's derivative is 1, whatever the log-probs are: there, NaN shows in the loss alone
        assert bool(terms.coefficients_L[place].isnan()) == (bad and switch != "kl k1")
        assert bool(terms.value_L[place].isnan()) == bad


def test_log_probs_that_are_not_in_use_are_not_looked_at() -> None:
    tokens = random_tokens(69)
    others = others_of(tokens, 70)
    nothing = np.full(len(tokens.mask), np.nan, np.float32)
    for switch, fields in USED.items():
        loss = LossConfig(**SWITCHES[switch])
        unused = {name: nothing for name in ("rollout", "proximal", "reference") if name not in fields}
        terms = found_terms("minpro", tokens, replace(others, **unused), loss)
        assert torch.equal(terms.coefficients_L, found_terms("minpro", tokens, others, loss).coefficients_L), switch


def test_where_no_token_is_trained_there_is_no_gradient() -> None:
    tokens, loss = random_tokens(71), LossConfig(**SWITCHES["everything"])
    tokens = replace(tokens, mask=np.zeros_like(tokens.mask))
    terms = found_terms("minpro", tokens, others_of(tokens, 72), loss)
    log_probs = torch.tensor(tokens.log_probs, requires_grad=True)
    value = summed_loss(log_probs, terms, torch.tensor(tokens.mask))
    value.backward()
    assert float(value.detach()) == 0
    assert log_probs.grad is not None
    assert not log_probs.grad.any()
