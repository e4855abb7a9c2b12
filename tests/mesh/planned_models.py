"""Models whose memory is planned and counted."""

from dataclasses import replace
from typing import Any

from minpro_megatron.models.architecture import Architecture


def architecture(mixture: bool, **changes: Any) -> Architecture:
    plain = Architecture(
        name="Qwen3MoeForCausalLM" if mixture else "Qwen3ForCausalLM",
        num_layers=4,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=16,
        ffn_hidden_size=192,
        num_experts=8 if mixture else 0,
        num_experts_per_token=2 if mixture else 0,
        expert_ffn_hidden_size=48 if mixture else 0,
        vocab_size=512,
        rope_theta=1e4,
        norm_epsilon=1e-6,
        tied_embeddings=False,
    )
    return replace(plain, **changes)
