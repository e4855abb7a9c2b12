"""The objectives equal loops written from the papers, and the loss has exactly the gradient that they state."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from minpro_megatron.config.objective import CispoConfig, GrpoConfig, MinproConfig
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.scan import WholeSequenceScan
from minpro_megatron.objective.terms import ObjectiveTerms, policy_tokens, summed_loss
from tests.unit.ragged_tokens import Tokens, clip, ppo_objective, prefix_minima, random_tokens

SETTINGS = {"minpro": MinproConfig(), "cispo": CispoConfig(), "grpo": GrpoConfig()}
PRECISIONS = [(torch.float32, 1e-6), (torch.float64, 1e-11)]
SEEDS = range(4)
# rho = (1.5, .5, 2, 30, 1): every interesting case of MinPRO in five tokens
FIVE_RATIOS = [1.5, 0.5, 2.0, 30.0, 1.0]


def one_sequence(ratios: list[float], advantage: float = 1.0, mask: list[int] | None = None) -> Tokens:
    count = len(ratios)
    return Tokens(
        np.log(ratios),
        np.zeros(count),
        np.full(count, advantage),
        np.array(mask or [1] * count, np.float64),
        np.zeros(count, np.int64),
    )


def terms_of(name: str, tokens: Tokens, dtype: torch.dtype = torch.float64) -> ObjectiveTerms:
    return OBJECTIVES[name].terms(tokens.for_objective(dtype), SETTINGS[name])


def assert_trained_equal(found: torch.Tensor, expected: Sequence[float], tokens: Tokens, tolerance: float) -> None:
    trained = tokens.mask > 0
    np.testing.assert_allclose(
        found.double().numpy()[trained], np.array(expected)[trained], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", ["minpro", "cispo"])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_weighted_objectives_equal_the_papers_loops(name: str, dtype: torch.dtype, tolerance: float, seed: int) -> None:
    tokens, settings = random_tokens(seed), SETTINGS[name]
    factors = prefix_minima(tokens) if name == "minpro" else [1.0] * len(tokens.mask)
    raw = [factor * ratio for factor, ratio in zip(factors, tokens.ratios, strict=True)]
    weights = [clip(value, 1 - settings.clip_low, 1 + settings.clip_high) for value in raw]
    coefficients = [w * float(a) for w, a in zip(weights, tokens.advantages, strict=True)]
    values = [-c * float(log_prob) for c, log_prob in zip(coefficients, tokens.log_probs, strict=True)]
    terms = terms_of(name, tokens, dtype)
    assert_trained_equal(terms.weight_L, weights, tokens, tolerance)
    assert_trained_equal(terms.coefficients_L, coefficients, tokens, tolerance)
    assert_trained_equal(terms.value_L, values, tokens, tolerance)
    clipped = [weight != value for weight, value in zip(weights, raw, strict=True)]
    assert_trained_equal(terms.clipped_L, clipped, tokens, 0)


@pytest.mark.parametrize("clips", [(1.0, 4.0), (0.3, 0.2)], ids=str)
def test_both_ends_of_the_clip_hold(clips: tuple[float, float]) -> None:
    settings = MinproConfig(clip_low=clips[0], clip_high=clips[1])
    tokens = random_tokens(5, drift=2.0)
    weights = OBJECTIVES["minpro"].terms(tokens.for_objective(torch.float64), settings).weight_L
    raw = [m * ratio for m, ratio in zip(prefix_minima(tokens), tokens.ratios, strict=True)]
    assert max(raw) > 1 + clips[1]
    assert_trained_equal(weights, [clip(w, 1 - clips[0], 1 + clips[1]) for w in raw], tokens, 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_equals_ppos_formula_and_its_gradient(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    tokens, settings = random_tokens(seed, drift=1.5), GrpoConfig()
    values, coefficients = [], []
    for ratio, advantage in zip(tokens.ratios, tokens.advantages, strict=True):
        log_ratio = torch.tensor(np.log(ratio), dtype=torch.float64, requires_grad=True)
        objective = ppo_objective(
            log_ratio, float(advantage), settings.clip_low, settings.clip_high, settings.dual_clip
        )
        (gradient,) = torch.autograd.grad(objective, log_ratio, allow_unused=True, materialize_grads=True)
        values.append(-float(objective.detach()))
        coefficients.append(float(gradient))
    terms = terms_of("grpo", tokens, dtype)
    assert_trained_equal(terms.value_L, values, tokens, 10 * tolerance)  # ratios up to e^5 in float32
    assert_trained_equal(terms.coefficients_L, coefficients, tokens, 10 * tolerance)


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
    terms = terms_of("grpo", one_sequence([ratio], advantage))
    assert float(terms.value_L) == pytest.approx(-objective, rel=1e-12)
    assert float(terms.coefficients_L) == pytest.approx(coefficient, rel=1e-12)
    assert bool(terms.clipped_L) == (coefficient == 0 and advantage != 0)


def test_minpro_of_the_five_ratios() -> None:
    tokens = one_sequence(FIVE_RATIOS)
    minima = tokens.for_objective(torch.float64).prefix_minimum_L
    torch.testing.assert_close(minima, torch.tensor([1, 1.5, 0.5, 0.5, 0.5]).double(), rtol=1e-12, atol=0)
    weights = terms_of("minpro", tokens).weight_L
    torch.testing.assert_close(weights, torch.tensor([1.5, 0.75, 1, 5, 0.5]).double(), rtol=1e-12, atol=0)


def test_the_prefix_minimum_may_exceed_one_and_skips_masked_tokens() -> None:
    tokens = one_sequence([0.1, 3.0, 0.2, 2.0, 5.0], mask=[0, 1, 0, 1, 1])
    minima = tokens.for_objective(torch.float64).prefix_minimum_L
    torch.testing.assert_close(minima, torch.tensor([1, 1, 3, 3, 2.0]).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_with_all_ratios_one_the_gradient_is_reinforces(name: str, aggregation: str) -> None:
    tokens = random_tokens(11)
    random = np.random.default_rng(3)
    logits = torch.tensor(random.normal(0, 2, (len(tokens.mask), 7)), requires_grad=True)
    actions = torch.tensor(random.integers(0, 7, (len(tokens.mask), 1)))
    weights = torch.tensor(token_weights(tokens, aggregation))

    log_probs = logits.log_softmax(-1).gather(1, actions)[:, 0]
    scan = WholeSequenceScan(torch.tensor(tokens.sequence), torch.tensor(tokens.mask))
    advantages = torch.tensor(tokens.advantages).double()
    seen = policy_tokens(
        log_probs, log_probs.detach(), advantages, torch.tensor(tokens.mask), scan, torch.arange(len(tokens.mask))
    )
    loss = summed_loss(log_probs, OBJECTIVES[name].terms(seen, SETTINGS[name]), weights)
    (found,) = torch.autograd.grad(loss, logits)

    log_probs = logits.log_softmax(-1).gather(1, actions)[:, 0]
    (expected,) = torch.autograd.grad(-(weights * advantages * log_probs).sum(), logits)
    assert expected.abs().max() > 0.1 * weights.max()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def token_weights(tokens: Tokens, aggregation: str) -> np.ndarray:
    """1 for each trained token, or 1 / trained tokens of its sequence."""
    weights = np.zeros(len(tokens.mask))
    for index, trained in enumerate(tokens.mask):
        if trained:
            of_sequence = [m for m, s in zip(tokens.mask, tokens.sequence, strict=True) if s == tokens.sequence[index]]
            weights[index] = 1.0 if aggregation == "token_mean" else 1.0 / int(sum(of_sequence))
    return weights


def test_with_prefix_factor_one_minpro_is_cispo_exactly() -> None:
    tokens = random_tokens(2)
    drift = np.abs(tokens.log_probs - tokens.behavior)  # all ratios >= 1 ...
    seen: set[int] = set()
    for index, sequence in enumerate(tokens.sequence):
        if tokens.mask[index] and sequence not in seen:
            seen.add(int(sequence))
            drift[index] = 0  # ... and the first trained one is 1, so every prefix minimum is 1
    tokens = replace(tokens, behavior=tokens.log_probs - drift)
    ours, cispo = terms_of("minpro", tokens, torch.float32), terms_of("cispo", tokens, torch.float32)
    trained = torch.tensor(tokens.mask) > 0
    for field in ("weight_L", "coefficients_L", "value_L", "clipped_L"):
        assert torch.equal(getattr(ours, field)[trained], getattr(cispo, field)[trained]), field
    assert ours.weight_L[trained].max() > 2


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_has_the_terms_value_and_minus_coefficient_times_weight_as_gradient(name: str) -> None:
    tokens = random_tokens(7)
    terms = terms_of(name, tokens)
    weights = torch.tensor(token_weights(tokens, "sequence_mean"))
    log_probs = torch.tensor(tokens.log_probs).double().requires_grad_()
    loss = summed_loss(log_probs, terms, weights)
    loss.backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, -terms.coefficients_L * weights, rtol=1e-14, atol=0)
    expected = sum(float(v) * float(w) for v, w in zip(terms.value_L, weights, strict=True))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-11)


def test_sequence_mean_is_the_sum_of_each_sequences_mean() -> None:
    tokens = random_tokens(9)
    terms = terms_of("minpro", tokens)
    loss = summed_loss(
        torch.tensor(tokens.log_probs).double(), terms, torch.tensor(token_weights(tokens, "sequence_mean"))
    )
    means = []
    for sequence in set(tokens.sequence.tolist()):
        values = terms.value_L.numpy()[(tokens.sequence == sequence) & (tokens.mask > 0)]
        if len(values):
            means.append(values.mean())
    assert len(means) == len(set(tokens.sequence.tolist())) - 1  # one sequence is masked wholly
    assert float(loss) == pytest.approx(sum(means), rel=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_masked_tokens_change_nothing(name: str) -> None:
    tokens = random_tokens(13)
    masked, trained = tokens.mask == 0, tokens.mask > 0
    wild = replace(
        tokens,
        log_probs=np.where(masked, -1e4, tokens.log_probs).astype(np.float32),
        behavior=np.where(masked, np.nan, tokens.behavior).astype(np.float32),
    )
    without = Tokens(
        *(
            values[trained]
            for values in (tokens.log_probs, tokens.behavior, tokens.advantages, tokens.mask, tokens.sequence)
        )
    )
    expected = terms_of(name, tokens)
    for terms, keep in ((terms_of(name, wild), trained), (terms_of(name, without), slice(None))):
        for field in ("coefficients_L", "value_L", "weight_L", "clipped_L"):
            assert torch.equal(getattr(terms, field)[keep], getattr(expected, field)[trained]), field
    weights = torch.tensor(tokens.mask).double()
    log_probs = torch.tensor(wild.log_probs).double().requires_grad_()
    summed_loss(log_probs, terms_of(name, wild), weights).backward()
    assert log_probs.grad is not None
    assert torch.equal(log_probs.grad[masked], torch.zeros(int(masked.sum())).double())


@pytest.mark.parametrize("name", SETTINGS)
def test_log_ratios_beyond_twenty_stay_finite(name: str) -> None:
    tokens = replace(
        one_sequence([1.0] * 4),
        log_probs=np.array([-60.0, -0.1, -0.1, -60.0]),
        behavior=np.array([-0.1, -60.0, -60.0, -0.1]),
    )
    seen = tokens.for_objective(torch.float32)
    assert seen.log_ratio_L.tolist() == [-20, 20, 20, -20]
    terms = OBJECTIVES[name].terms(seen, SETTINGS[name])
    for field in ("coefficients_L", "value_L", "weight_L"):
        assert getattr(terms, field).isfinite().all(), field


def test_objectives_keep_no_gradient() -> None:
    log_probs = torch.tensor([-0.5, -1.0, -0.2], requires_grad=True)
    mask = torch.ones(3)
    scan = WholeSequenceScan(torch.zeros(3, dtype=torch.int64), mask)
    tokens = policy_tokens(log_probs, torch.zeros(3), torch.ones(3), mask, scan, torch.arange(3))
    for name in SETTINGS:
        objective = OBJECTIVES[name]
        terms = objective.terms(tokens, SETTINGS[name])
        assert not any(value.requires_grad for value in vars(terms).values()), name
