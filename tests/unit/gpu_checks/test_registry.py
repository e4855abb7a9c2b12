"""The list of the checks fits its budget, and names modules that exist."""

from collections import Counter
from pathlib import Path

import pytest

import minpro_megatron.gpu_checks
from minpro_megatron.errors import UserError
from minpro_megatron.gpu_checks.registry import BUDGET_S, CHECKS, START_S, selected

FOLDER = Path(minpro_megatron.gpu_checks.__file__).parent


def test_the_checks_without_transformer_engine_are_expected_to_fit_the_budget() -> None:
    plain = [check for check in CHECKS if not check.transformer_engine]
    assert START_S + sum(check.expected_s for check in plain) <= BUDGET_S
    assert all(check.expected_s <= check.limit_s < BUDGET_S for check in CHECKS)


def test_names_are_distinct_and_modules_exist() -> None:
    assert max(Counter(check.name for check in CHECKS).values()) == 1
    assert all((FOLDER / f"{check.module}.py").is_file() for check in CHECKS)


def test_checks_are_selected_in_the_order_of_the_list() -> None:
    assert [check.name for check in selected(["attention", "log_probs"])] == ["log_probs", "attention"]
    assert selected([]) == list(CHECKS)
    with pytest.raises(UserError, match=r"--only atention: there is no such check \(did you mean .*attention"):
        selected(["log_probs", "atention"])
