"""How much computation a model's forward pass takes."""

from minpro_megatron.batching.packing import SequenceCost
from minpro_megatron.weights.architecture import Architecture


def forward_flops(architecture: Architecture) -> SequenceCost:
    """Floating-point operations (a multiplication and an addition are two) for one sequence; backward takes twice that.

    Matrix products only: projections, the chosen experts or the dense layer, router, output layer, and causal
    attention's two products, which touch half of the n^2 pairs.
    """
    heads = architecture.num_attention_heads * architecture.head_dim
    groups = architecture.num_query_groups * architecture.head_dim
    hidden = architecture.hidden_size
    attention = hidden * (heads + 2 * groups) + heads * hidden
    if architecture.num_experts:
        chosen = architecture.num_experts_per_token * architecture.expert_ffn_hidden_size
        feed_forward = 3 * hidden * chosen + hidden * architecture.num_experts
    else:
        feed_forward = 3 * hidden * architecture.ffn_hidden_size
    weights = architecture.num_layers * (attention + feed_forward) + hidden * architecture.vocab_size
    return SequenceCost(linear=2.0 * weights, quadratic=2.0 * architecture.num_layers * heads)
