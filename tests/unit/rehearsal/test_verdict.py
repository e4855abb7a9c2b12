"""Which rehearsed ranks speak against a launch, and the message about them."""

from typing import Any

import pytest

from minpro_megatron.errors import UserError
from minpro_megatron.launch.recipe import apply_overrides, load_recipe
from minpro_megatron.planning.gpus import gpu_kind
from minpro_megatron.rehearsal import verdict
from minpro_megatron.rehearsal.record import Phase
from minpro_megatron.rehearsal.subject import Rehearsed
from tests.support.rehearsed_ranks import rehearsed_rank

RECIPE = "recipes.qwen3_8b:minpro"
H100 = gpu_kind("h100-80gb")


def subject(*overrides: str) -> Rehearsed:
    return Rehearsed(RECIPE, apply_overrides(load_recipe(RECIPE), list(overrides)), rank=0)


def test_a_rank_that_fits_is_no_problem() -> None:
    assert verdict.rank_problems(rehearsed_rank(), subject(), H100) == []


def test_a_mismatch_names_rank_phase_and_what_to_do() -> None:
    found = rehearsed_rank(problems=["score: RuntimeError at actor/policy.py:1: devices, 1 times"])
    (problem,) = verdict.rank_problems(found, subject(), H100)
    assert problem.startswith("rehearsal of rank 0 (data 0/2): score: RuntimeError at actor/policy.py:1")
    assert "minpro rehearse recipes.qwen3_8b:minpro --rank 0" in problem


def test_more_than_the_gpu_has_names_phase_bytes_and_a_remedy() -> None:
    """78 GB of tensors are less than the 84.8 GB of the GPU, but not with the allocator's fragments and the context."""
    phases = [Phase("build", peak={"cuda": 40 * 10**9}), Phase("update", peak={"cuda": 78 * 10**9})]
    found = rehearsed_rank(phases=phases)
    (problem,) = verdict.rank_problems(found, subject("model.recompute=none"), H100)
    assert problem.startswith(
        "rehearsal of rank 0 (data 0/2): 85.1 GB in the phase 'update' (tensors 78.0) must be at most the 84.8 GB of "
        "h100-80gb: set model.recompute = selective"
    )
    assert verdict.rank_problems(found, subject(), gpu_kind("h200-141gb")) == []


def test_the_innermost_phase_of_a_peak_is_named() -> None:
    assert verdict.highest_phase(rehearsed_rank().phases).name == "update > log-probs backward"


def test_all_ranks_are_rehearsed_before_the_problems_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def rehearsed(what: Rehearsed, overrides: Any) -> Any:
        given.append((what.imbalance, list(overrides)))
        yield rehearsed_rank(problems=["score: first, 1 times"])
        yield rehearsed_rank(rank=7, problems=["score: second, 1 times"])

    monkeypatch.setattr(verdict, "rehearse_kinds", rehearsed)
    config = load_recipe(RECIPE)
    with pytest.raises(UserError) as raised:
        verdict.refuse_what_does_not_fit(RECIPE, config, ["model.recompute=none"], "h100-80gb")
    assert ["rank 0" in raised.value.problems[0], "rank 7" in raised.value.problems[1]] == [True, True]
    assert given == [(1.3, ["model.recompute=none"])]
    assert "rank 7 (data 0/2): 55.7 GB in the phase 'update > log-probs backward'" in capsys.readouterr().out
