"""The reference engine's sampler: right distribution, right log-prob, the same draws for the same seed."""

import math
from collections import Counter

import msgspec
import numpy as np
import pytest
import torch

from minpro_megatron.reference_engine.sampling import DEFAULT_SEED, Sampler, SamplingParameters
from tests.support.reference_models import float64_probs

LOGITS_V = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.0])  # in order of probability: tokens 1, 2, 0, 4, 3
NUM_DRAWS = 1500


def draws(count: int = NUM_DRAWS, **parameters: object) -> Counter[int]:
    sampler = Sampler(msgspec.convert({"sampling_seed": 7, **parameters}, SamplingParameters))
    return Counter(sampler(LOGITS_V)[0] for _ in range(count))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_as_frequent_as_they_are_probable(temperature):
    found, probs = draws(temperature=temperature), float64_probs(LOGITS_V, temperature)
    shares = np.array([found[token] / NUM_DRAWS for token in range(5)])
    assert np.abs(shares - probs).max() < 4 * math.sqrt(0.25 / NUM_DRAWS)


@pytest.mark.parametrize(
    ("parameters", "allowed"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 0}),
        ({"top_p": 0.5}, {1}),  # token 1 alone has 0.55
        ({"top_p": 0.6}, {1, 2}),
        ({"top_p": 0.9}, {1, 2, 0}),
        ({"top_p": 0.9, "top_k": 2}, {1, 2}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_and_top_k_leave_the_likeliest(parameters, allowed):
    found, probs = draws(**parameters), float64_probs(LOGITS_V, 1.0)
    assert set(found) == allowed
    kept = sum(probs[token] for token in allowed)
    assert all(abs(found[token] / NUM_DRAWS - probs[token] / kept) < 0.06 for token in allowed)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (0.7, 0.6), (0.0, 1.0), (1e-7, 0.5)])
def test_log_probs_are_of_the_whole_distribution_at_the_temperature(temperature, top_p):
    sampler = Sampler(SamplingParameters(temperature=temperature, top_p=top_p, sampling_seed=1))
    probs = float64_probs(LOGITS_V, temperature if temperature > 1e-6 else 1.0)
    for _ in range(10):
        token, log_prob = sampler(LOGITS_V)
        assert abs(log_prob - math.log(probs[token])) < 1e-6
        assert temperature > 1e-6 or token == 1


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"top_k": 3}, [1, 2, 0]),
        ({"top_k": 4, "top_p": 0.6, "temperature": 0.8}, [1]),
        ({"top_k": 4, "top_p": 0.7, "temperature": 0.8}, [1, 2]),
        ({"top_k": 3, "temperature": 0.0}, [1]),
    ],
)
def test_kept_ids_are_the_likeliest_and_the_log_prob_is_that_among_them(parameters, kept):
    sampler = Sampler(SamplingParameters(sampling_seed=1, **parameters))
    probs = float64_probs(LOGITS_V, parameters.get("temperature") or 1.0)
    for _ in range(10):
        sampled = sampler.sample(LOGITS_V)
        assert sampled.kept_ids == kept
        assert abs(sampled.kept_log_prob - math.log(probs[sampled.token] / sum(probs[token] for token in kept))) < 1e-6
        assert abs(sampled.log_prob - math.log(probs[sampled.token])) < 1e-6


def test_a_seed_is_a_stream_of_its_own():
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParameters(sampling_seed=seed))
        return [sampler(LOGITS_V)[0] for _ in range(30)]

    assert tokens(5) == tokens(5) != tokens(6)
    assert tokens(None) == tokens(DEFAULT_SEED)


def test_a_draw_at_the_very_end_chooses_a_token():
    """The point may be rounded up to the sum of the weights, past the last token."""
    sampler = Sampler(SamplingParameters())
    sampler._generator = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1.0, dtype=torch.float64))
        assert sampler._draw(torch.tensor([0.25, 0.75], dtype=torch.float64)) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", 0), ("max_new_tokens", 0), ("n", 2), ("bogus", 1)],
)
def test_parameters_that_are_not_served_are_named(field, value):
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert({field: value}, SamplingParameters)
