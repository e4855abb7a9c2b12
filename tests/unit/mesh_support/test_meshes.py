"""The list of all meshes is complete, and the few that stand for them try every pair of choices."""

from dataclasses import replace
from itertools import combinations

import pytest

from minpro_megatron.models.architecture import Architecture
from tests.mesh.meshes import Case, Degrees, all_cases, allowed_degrees, pairwise_cover

DENSE = Architecture(
    name="Qwen3ForCausalLM",
    num_layers=6,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    ffn_hidden_size=64,
    num_experts=0,
    num_experts_per_token=0,
    expert_ffn_hidden_size=0,
    vocab_size=77,
    rope_theta=1e4,
    norm_epsilon=1e-6,
    tied_embeddings=False,
)
MIXTURE = replace(
    DENSE, name="Qwen3MoeForCausalLM", num_layers=4, num_experts=8, num_experts_per_token=2, expert_ffn_hidden_size=16
)
CASES = all_cases({"moe": MIXTURE, "dense": DENSE})
HARDEST = Case("moe", Degrees(tensor=2, pipeline=2, expert=2, context=2), packing=True)


@pytest.mark.parametrize(("architecture", "layer_cuts"), [(MIXTURE, (1, 2, 4)), (DENSE, (1, 2, 3, 6))])
def test_every_allowed_factorisation_is_listed_once(architecture: Architecture, layer_cuts: tuple[int, ...]) -> None:
    """Counted again from the model's sizes: 8 heads, the layers, 8 experts or none."""
    expected = [
        Degrees(tensor, pipeline, expert, context, data)
        for tensor in (1, 2, 4, 8)
        for pipeline in layer_cuts
        for context in range(1, 9)
        for data in range(1, 9)
        if tensor * pipeline * context * data <= 8
        for expert in ((1, 2, 4, 8) if architecture.num_experts else (1,))
        if tensor * context * data % expert == 0
    ]
    found = allowed_degrees(architecture)
    assert sorted(found) == sorted(expected)
    assert len(set(found)) == len(found) == {0: 49, 8: 117}[architecture.num_experts]


def test_meshes_may_be_smaller() -> None:
    assert allowed_degrees(MIXTURE, max_ranks=1) == [Degrees()]
    assert {degrees.num_ranks for degrees in allowed_degrees(DENSE, max_ranks=3)} == {1, 2, 3}


def test_at_most_16_meshes_hold_every_pair_of_choices() -> None:
    cover = pairwise_cover(CASES, first=HARDEST)
    assert cover[0] == HARDEST
    assert len(cover) <= 16
    assert set(cover) <= set(CASES)
    assert _pairs(cover) == _pairs(CASES)
    assert {case.packing for case in cover if case.model == "dense"} == {True, False}


def test_the_choice_is_the_same_every_time() -> None:
    assert pairwise_cover(CASES, first=HARDEST) == pairwise_cover(reversed(CASES), first=HARDEST)


def _pairs(cases: list[Case]) -> set[tuple]:
    """Written apart from meshes.py: degrees by name, 1, 2 and more; model; packing."""
    found = set()
    for case in cases:
        choices = {axis: min(degree, 3) for axis, degree in case.degrees.as_settings.items()}
        choices |= {"model": case.model, "packing": case.packing}
        found.update(combinations(sorted(choices.items()), 2))
    return found
