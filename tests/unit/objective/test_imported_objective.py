"""An objective by its import path: it is what its function says, and what its function must not say is one line."""

import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from minpro_megatron.config.objective import ImportedObjectiveConfig
from minpro_megatron.hooks.hook import Hook, HookError
from minpro_megatron.objective.imported import checked_terms
from minpro_megatron.objective.registry import objective_for
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens
from tests.support.ragged_tokens import random_tokens

EXAMPLE = "docs.examples.objective:smooth_cispo"
HOOK = Hook("objective.name", "my.module:function")


def tokens() -> PolicyTokens:
    return random_tokens(0, drift=2.0).for_objective(torch.float32)


def test_the_function_gets_the_settings_as_a_dictionary() -> None:
    seen = tokens()
    settings = ImportedObjectiveConfig(name=EXAMPLE, settings={"scale": 3.0})
    plain = objective_for(ImportedObjectiveConfig(name=EXAMPLE)).terms(seen, ImportedObjectiveConfig(name=EXAMPLE))
    scaled = objective_for(settings).terms(seen, settings)
    torch.testing.assert_close(scaled.weight_L, 1.5 * plain.weight_L)
    assert scaled.coefficients_L.dtype == torch.float64


def test_the_projects_objectives_are_found_by_name() -> None:
    assert objective_for(ImportedObjectiveConfig(name=EXAMPLE)).survey is None


def good(seen: PolicyTokens) -> ObjectiveTerms:
    ratio = seen.log_ratio_L.exp()
    flags = torch.zeros_like(seen.is_trained_L)
    return ObjectiveTerms(ratio * seen.advantages_L, -ratio * seen.advantages_L, ratio, flags, flags)


def nan_at_the_first_trained(value: torch.Tensor, seen: PolicyTokens) -> torch.Tensor:
    place = int(seen.is_trained_L.nonzero()[0])
    return torch.where(torch.arange(len(value)) == place, torch.nan, value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda terms, seen: None, "it must return ObjectiveTerms, not NoneType"),
        (lambda terms, seen: terms.coefficients_L, "it must return ObjectiveTerms, not Tensor"),
        (
            lambda terms, seen: replace(terms, value_L=terms.value_L.sum()),
            r"value_L must be a tensor of shape \(\d+,\)",
        ),
        (lambda terms, seen: replace(terms, weight_L=1.0), r"weight_L must be a tensor of shape .*, not float"),
        (lambda terms, seen: replace(terms, weight_L=terms.weight_L[1:]), r"weight_L must be .* not \(\d+,\)"),
        (
            lambda terms, seen: replace(terms, clipped_L=terms.weight_L),
            "clipped_L must be a tensor of bool, not torch.fl",
        ),
        (
            lambda terms, seen: replace(terms, value_L=terms.clipped_L),
            "value_L must be a tensor of numbers, not torch.bo",
        ),
        (
            lambda terms, seen: replace(terms, value_L=nan_at_the_first_trained(terms.value_L, seen)),
            "value_L is not finite for 1 trained tokens whose log-ratio and advantage are finite",
        ),
        (
            lambda terms, seen: replace(terms, coefficients_L=nan_at_the_first_trained(terms.coefficients_L, seen)),
            "coefficients_L is not finite for 1 trained tokens",
        ),
    ],
)
def test_a_result_against_the_rule_is_one_line_with_the_hook(change: Callable[..., Any], told: str) -> None:
    seen = tokens()
    with pytest.raises(HookError, match=told) as error:
        checked_terms(HOOK, seen, change(good(seen), seen))
    assert str(error.value).startswith("objective.name = my.module:function: ")
    assert "\n" not in str(error.value)


def test_what_is_masked_or_was_not_finite_before_is_allowed() -> None:
    """A policy that has diverged is reported as such, and not as a fault of the hook."""
    seen = tokens()
    masked = torch.where(seen.is_trained_L, good(seen).value_L, torch.nan)
    checked_terms(HOOK, seen, replace(good(seen), value_L=masked))
    diverged = replace(seen, log_ratio_L=torch.full_like(seen.log_ratio_L, torch.nan))
    checked_terms(HOOK, diverged, replace(good(seen), value_L=torch.full_like(good(seen).value_L, torch.nan)))


def test_the_result_carries_no_gradient() -> None:
    seen = tokens()
    value = good(seen).value_L.float().requires_grad_()
    found = checked_terms(HOOK, seen, replace(good(seen), value_L=2 * value))
    assert not found.value_L.requires_grad
    assert found.value_L.dtype == torch.float64


def test_an_error_in_the_function_keeps_its_traceback_and_names_the_setting() -> None:
    settings = ImportedObjectiveConfig(name=EXAMPLE, settings={"scale": "three"})
    with pytest.raises(TypeError) as error:
        objective_for(settings).terms(tokens(), settings)
    shown = "".join(traceback.format_exception(error.value))
    assert "docs/examples/objective.py" in shown
    assert f"raised by the function of the setting objective.name = {EXAMPLE}" in shown
