"""The number of parameters on every rank of a mesh, computed without loading a model.

The numbers are the same as those of weights/plan.py, which counts them in the conversion table and needs torch; a
submitting machine may not have torch. tests/unit/planning/test_planning_memory.py compares the two.
"""

from dataclasses import dataclass

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.models.architecture import Architecture


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters on each rank of a pipeline stage."""

    layers: int
    dense: int  # attention, norms, router, shared experts, dense layers, embedding, output layer
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def layer_parameters(a: Architecture, tensor: int, expert: int, expert_tensor: int, mixture: bool) -> tuple[int, int]:
    """(dense, expert) parameters of one layer on a rank; `mixture`: it has experts."""
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    norms = 2 * a.hidden_size + 2 * a.head_dim * a.qk_norm
    attention = (a.hidden_size + a.qkv_bias) * (queries + 2 * keys) // tensor + a.hidden_size * queries // tensor
    if not mixture:
        return norms + attention + 3 * a.hidden_size * a.ffn_hidden_size // tensor, 0
    router = a.num_experts * (a.hidden_size + a.sigmoid_routing)
    shared = 3 * a.hidden_size * a.shared_ffn_hidden_size // tensor
    one_expert = 3 * a.hidden_size * a.expert_ffn_hidden_size // expert_tensor
    return norms + attention + router + shared, a.num_experts // expert * one_expert


def projection_shapes(a: Architecture, tensor: int, expert_tensor: int) -> list[tuple[int, int]]:
    """(rows, columns) of the weights of the layers' projections on a rank: attention's two and those of feed-forward
    layers, of an expert and of shared experts, as far as the model has them."""
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    attention = [((queries + 2 * keys) // tensor, a.hidden_size), (a.hidden_size, queries // tensor)]
    widths = [a.expert_ffn_hidden_size // expert_tensor, a.shared_ffn_hidden_size // tensor]
    if a.expert_layers < a.num_layers:
        widths.append(a.ffn_hidden_size // tensor)
    networks = [[(2 * width, a.hidden_size), (a.hidden_size, width)] for width in widths if width]
    return [*attention, *(shape for network in networks for shape in network)]


def stage_parameters(a: Architecture, parallel: ParallelConfig, stage: int) -> RankParameters:
    plain, mixtures = layers_of_stage(a, parallel, stage)
    degrees = parallel.tensor, parallel.expert, parallel.expert_tensor
    dense, experts = layer_parameters(a, *degrees, mixture=True)
    of_plain, _ = layer_parameters(a, *degrees, mixture=False)
    vocabulary = a.padded_vocab_size * a.hidden_size // parallel.tensor
    last = stage == parallel.pipeline - 1
    outside = vocabulary if stage == 0 else 0
    if last:
        # a tied output layer is the embedding itself with one stage, and a copy on the last of several stages
        outside += a.hidden_size + (0 if a.tied_embeddings and stage == 0 else vocabulary)
    return RankParameters(plain + mixtures, plain * of_plain + mixtures * dense + outside, mixtures * experts)


def layers_of_stage(a: Architecture, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """(layers without experts, layers with experts) of a pipeline stage."""
    chunks = [layers_of_chunk(a, parallel, chunk) for chunk in parallel.chunks_of_stage(stage)]
    return sum(plain for plain, _ in chunks), sum(mixtures for _, mixtures in chunks)


def layers_of_chunk(a: Architecture, parallel: ParallelConfig, chunk: int) -> tuple[int, int]:
    """(layers without experts, layers with experts) of a model chunk; the former come first."""
    sizes = parallel.chunk_layers(a.num_layers)
    first = sum(sizes[:chunk])
    plain = sum(not a.has_experts(layer) for layer in range(first, first + sizes[chunk]))
    return plain, sizes[chunk] - plain


def model_parameters(a: Architecture) -> int:
    """Parameters of the entire model in Hugging Face format, without vocabulary padding."""
    padding = (a.padded_vocab_size - a.vocab_size) * a.hidden_size * (1 if a.tied_embeddings else 2)
    return stage_parameters(a, ParallelConfig(), 0).total - padding


def active_parameters(a: Architecture) -> int:
    """Parameters that are multiplied with one token: all except the embedding and the experts that it is not sent
    to."""
    if not a.num_experts:
        return model_parameters(a) - (0 if a.tied_embeddings else a.vocab_size * a.hidden_size)
    unused = a.num_experts - a.num_experts_per_token
    idle = a.expert_layers * unused * 3 * a.hidden_size * a.expert_ffn_hidden_size
    return model_parameters(a) - idle - (0 if a.tied_embeddings else a.vocab_size * a.hidden_size)


def optimizer_degrees(parallel: ParallelConfig) -> tuple[int, int]:
    """Numbers of ranks over which the optimizer's states are sharded: those of dense parameters, those of experts."""
    dense = parallel.data_size * parallel.context
    return dense, parallel.tensor * dense // (parallel.expert * parallel.expert_tensor)
