"""The computation of a forward pass, against the released figures."""

import pytest

from minpro_megatron.actor.flops import forward_flops
from minpro_megatron.models.architecture import Architecture

COMMON = {"vocab_size": 151_936, "rope_theta": 1e6, "norm_epsilon": 1e-6, "head_dim": 128, "tied_embeddings": False}
MIXTURE = Architecture(
    name="Qwen3-30B-A3B",
    num_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    num_query_groups=4,
    ffn_hidden_size=6144,
    num_experts=128,
    num_experts_per_token=8,
    expert_ffn_hidden_size=768,
    **COMMON,
)
DENSE = Architecture(
    name="Qwen3-8B",
    num_layers=36,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=12_288,
    num_experts=0,
    num_experts_per_token=0,
    expert_ffn_hidden_size=0,
    **COMMON,
)


@pytest.mark.parametrize(("architecture", "active"), [(MIXTURE, 3.3e9), (DENSE, 8.19e9)], ids=["30B-A3B", "8B"])
def test_two_operations_for_every_active_weight_but_the_embedding(architecture: Architecture, active: float) -> None:
    embedding = architecture.vocab_size * architecture.hidden_size
    assert forward_flops(architecture).linear == pytest.approx(2 * (active - embedding), rel=0.03)


def test_attention_costs_as_much_as_the_rest_at_about_sixteen_thousand_tokens() -> None:
    cost = forward_flops(MIXTURE)
    assert cost.linear / cost.quadratic == pytest.approx(15_500, rel=0.05)
    assert cost.of(2) == pytest.approx(2 * cost.linear + 4 * cost.quadratic)
