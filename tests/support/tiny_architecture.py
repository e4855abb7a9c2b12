"""A small mixture: every kind of weight once."""

from minpro_megatron.models.architecture import Architecture

TINY = Architecture(
    name="Qwen3MoeForCausalLM",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=64,
    num_experts=3,
    num_experts_per_token=2,
    expert_ffn_hidden_size=16,
    vocab_size=77,
    rope_theta=1e4,
    norm_epsilon=1e-6,
    tied_embeddings=False,
)
