"""The objectives with a trust region: examples by hand, the other divergence, and what wrong versions would give."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minpro_megatron.config import objective as config
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.formulas import trust_region
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import PolicyTokens
from tests.support.objective_loops import LOOPS
from tests.support.ragged_tokens import Tokens, one_sequence, terms_of


def sampled_tokens(seed: int, num_sequences: int = 12, longest: int = 30) -> Tokens:
    """Ragged sequences with masked tokens whose probabilities are at most 1, near each other and of all sizes."""
    random = np.random.default_rng(seed)
    sequence = np.repeat(np.arange(num_sequences), random.integers(1, longest + 1, num_sequences))
    old = random.uniform(0.01, 0.99, len(sequence))
    new = np.clip(old + random.normal(0, 0.15, len(old)), 0.005, 0.995)
    advantages = random.choice([-1.3, -0.4, 0.6, 1.7], num_sequences)[sequence]
    mask = (random.random(len(old)) > 0.2).astype(np.float64)
    return Tokens(np.log(new), np.log(old), advantages, mask, sequence)


def with_probabilities(new: list[float], old: list[float], advantage: float = 1.0) -> Tokens:
    return replace(one_sequence([1.0] * len(new), advantage), log_probs=np.log(new), behavior=np.log(old))


def test_dppo_of_four_tokens_by_hand() -> None:
    tokens = with_probabilities([0.6, 0.8, 0.1, 0.2], [0.5, 0.5, 0.5, 0.01])
    terms = terms_of("dppo", tokens, config.DppoConfig())
    np.testing.assert_allclose(terms.weight_L, [1.2, 0, 0.2, 20], rtol=1e-12, atol=0)
    assert terms.excluded_L.tolist() == [False, True, False, False]
    down = terms_of("dppo", replace(tokens, advantages=-tokens.advantages), config.DppoConfig(largest_ratio=3.0))
    np.testing.assert_allclose(down.weight_L, [1.2, 1.6, 0, 3], rtol=1e-12, atol=0)


def test_cppo_of_four_tokens_by_hand() -> None:
    tokens = with_probabilities([0.55, 0.64, 0.6, 0.55], [0.5] * 4)
    settings = config.CppoConfig(threshold=0.15, budget=0.06, smallest_weight=0.8)
    assert terms_of("cppo", tokens, settings).excluded_L.tolist() == [False, False, True, False]
    down = replace(tokens, advantages=-tokens.advantages)  # all ratios move toward one
    assert not terms_of("cppo", down, settings).excluded_L.any()


def test_trm_of_two_sequences_by_hand() -> None:
    tokens = with_probabilities([0.51, 0.53, 0.56, 0.5], [0.5] * 4)
    tokens = replace(tokens, sequence=np.array([0, 0, 1, 1]))
    for largest, mean in ((0.05, None), (None, 0.025)):
        settings = config.TrmConfig(divergence="total_variation", max_divergence=largest, mean_divergence=mean)
        assert terms_of("trm", tokens, settings).excluded_L.tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="trm needs one of them"):
        config.TrmConfig(max_divergence=None)


# other settings than those of tests of all objectives
CASES: dict[str, Any] = {
    "dppo": config.DppoConfig(threshold_low=0.1, threshold_high=0.15),
    "dppo kl": config.DppoConfig(divergence="kl", threshold_low=0.02, threshold_high=0.05, largest_ratio=None),
    "cppo": config.CppoConfig(threshold=0.2, budget=0.1),
    "cppo kl": config.CppoConfig(divergence="kl", threshold=0.1, budget=0.05),
    "trm": config.TrmConfig(max_divergence=None, mean_divergence=0.08),
    "trm total variation": config.TrmConfig(divergence="total_variation", max_divergence=0.3),
    "cppo horizon": config.CppoConfig(budget=0.1, smallest_weight=0.3, horizon=20, largest_ratio=1.5),
}


@pytest.mark.parametrize("case", CASES)
def test_probable_tokens_equal_the_papers_loop(case: str) -> None:
    tokens, settings = sampled_tokens(3), CASES[case]
    name = case.partition(" ")[0]
    terms, expected = terms_of(name, tokens, settings), LOOPS[name](tokens, settings)
    trained = tokens.trained
    np.testing.assert_allclose(terms.coefficients_L[trained], np.array(expected.coefficients)[trained], rtol=1e-12)
    np.testing.assert_allclose(terms.value_L[trained], np.array(expected.values)[trained], rtol=1e-12)
    excluded = terms.excluded_L[trained].double().mean()
    assert 0.05 < excluded < 0.7


# ---- wrong versions, which the comparison with the loop must notice


class InclusiveSums(WholeSequenceScan):
    """Counts the token itself among the earlier ones."""

    def exclusive(self, values_L: Tensor, operator: Any) -> Tensor:
        return self.inclusive(values_L, operator)


def ratio_deviation(tokens: PolicyTokens) -> Tensor:
    """PPO's |rho - 1| in place of a divergence."""
    return (tokens.log_ratio_L.exp() - 1).abs()


def inclusive(name: str, tokens: Tokens, settings: Any, patch: pytest.MonkeyPatch) -> Tensor:
    seen = tokens.for_objective(torch.float64)
    scan = InclusiveSums(torch.tensor(tokens.sequence), seen.mask_L)
    return OBJECTIVES[name].terms(replace(seen, scan=scan), settings).coefficients_L


def by_ratio(name: str, tokens: Tokens, settings: Any, patch: pytest.MonkeyPatch) -> Tensor:
    patch.setitem(trust_region.DIVERGENCES, settings.divergence, ratio_deviation)
    return terms_of(name, tokens, settings).coefficients_L


def of_one_sequence(name: str, tokens: Tokens, settings: Any, patch: pytest.MonkeyPatch) -> Tensor:
    return terms_of(name, replace(tokens, sequence=np.zeros_like(tokens.sequence)), settings).coefficients_L


WRONG: list[tuple[str, Callable[..., Tensor]]] = [
    ("dppo", by_ratio),
    ("cppo", by_ratio),
    ("trm", by_ratio),
    ("trm", of_one_sequence),
    ("cppo", inclusive),
    ("cppo", of_one_sequence),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_wrong_version_is_far_from_the_loop(
    name: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, settings = sampled_tokens(3), CASES[name]
    expected = np.array(LOOPS[name](tokens, settings).coefficients)
    found = wrong(name, tokens, settings, monkeypatch).numpy()
    assert np.abs(found - expected)[tokens.trained].max() > 0.3
