"""The memory of a rank that scores canaries: the most that servers may generate after a publication.

Counted as Transformer Engine's layers hold tensors in a pass without gradients; benchmarks/plan_run.md compares it with
rehearsed ranks. Torch's layers need less than is planned for them.
"""

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.planning.activations import FLOAT32, LOGIT_BLOCKS, Compute, Row, layer_activations
from minpro_megatron.planning.parameters import layers_of_stage
from minpro_megatron.planning.update_rows import padded_lengths, row_plan
from minpro_megatron.publishing.canary_count import most_canaries


def canary_bytes(config: RunConfig, a: Architecture, compute: Compute, stage: int) -> int:
    """Bytes on a rank of the stage, in addition to its weights and workspaces; 0 if a run compares no canaries."""
    row, parallel = canary_row(config, a), config.parallel
    if row is None:
        return 0
    plain, mixtures = layers_of_stage(a, parallel, stage)
    parts = []
    if plain:
        parts.append(_dense_layer(a, parallel, row, compute))
    if mixtures:
        parts.append(_mixture_layer(a, parallel, row, compute))
    if stage == parallel.pipeline - 1:
        parts.append(_log_probs(a, parallel, row, compute))
    angles = 0
    if compute.fused:
        sequence = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
        longest = min(sequence, config.batch.max_tokens_per_row)  # whose angles stay from training
        angles = parallel.virtual_pipeline * (longest + row.sequence_tokens) * a.head_dim * FLOAT32
    return angles + max(parts)


def canary_row(config: RunConfig, a: Architecture) -> Row | None:
    """The longest row of the pass over all canaries, as the trainer packs them; None without canaries."""
    canaries = most_canaries(config)
    if not canaries.count:
        return None
    longest = min(canaries.prompt_tokens + canaries.continuation_tokens, config.batch.max_tokens_per_row)
    rows = row_plan(config, a).rows(padded_lengths(config, [longest] * canaries.count))
    return Row(max(map(sum, rows.lengths)), longest)


def _dense_layer(a: Architecture, parallel: ParallelConfig, row: Row, compute: Compute) -> int:
    """While the network after attention, which takes less, is computed."""
    tokens, hidden = _tokens(parallel, row), _hidden(a, parallel, row, compute)
    if not compute.fused:
        layer = layer_activations(a, parallel, row, compute, mixture=False)
        return hidden + layer.kept + layer.backward
    whole = hidden * parallel.tensor if parallel.tensor > 1 else 0  # the norm's output of all tensor ranks
    width = a.ffn_hidden_size // parallel.tensor * tokens * compute.element_bytes
    # what the stage received, the layer's input and the sum after attention; then gate and up projection of the norm's
    # output, or both and their product
    return 3 * hidden + max(hidden + whole + 2 * width, 3 * width)


def _mixture_layer(a: Architecture, parallel: ParallelConfig, row: Row, compute: Compute) -> int:
    """While an expert's second product is computed."""
    tokens, hidden = _tokens(parallel, row), _hidden(a, parallel, row, compute)
    if not compute.fused:
        layer = layer_activations(a, parallel, row, compute, mixture=True)
        return hidden + layer.kept + layer.backward
    local, element = tokens // parallel.tensor, compute.element_bytes
    sent = local * a.num_experts_per_token
    rows = round(sent * parallel.expert_tensor * (compute.expert_imbalance if parallel.expert > 1 else 1.0))
    width = a.expert_ffn_hidden_size // parallel.expert_tensor
    received = rows if parallel.expert * parallel.expert_tensor > 1 else 0
    # as they are sent, received, sorted by expert, and the experts' results
    routed = (sent + received + 2 * rows) * a.hidden_size * element + rows * 3 * width * element
    # probability and choice of every expert, and its places among the rows that are sent
    routes = local * (a.num_experts * (FLOAT32 + 1) + (2 * a.num_experts + 1) * 4)
    # what the stage received, the layer's input, the sum after attention, the norm's output; shared experts' results
    return (4 + (a.shared_ffn_hidden_size > 0)) * hidden + routed + routes


def _log_probs(a: Architecture, parallel: ParallelConfig, row: Row, compute: Compute) -> int:
    """While a block of logits is added up."""
    block_tokens, block_columns = LOGIT_BLOCKS[compute.device]
    tokens = min(block_tokens, _tokens(parallel, row))
    block = tokens * min(block_columns, a.padded_vocab_size // parallel.tensor) * FLOAT32
    if compute.device == "cpu":
        block *= 4  # the inputs of exponentials and sums; not one kernel
    gathered = tokens * a.hidden_size * compute.element_bytes if parallel.tensor > 1 else 0
    return 2 * _hidden(a, parallel, row, compute) + gathered + block  # of the last layer, and the final norm's output


def _tokens(parallel: ParallelConfig, row: Row) -> int:
    return row.tokens // parallel.context


def _hidden(a: Architecture, parallel: ParallelConfig, row: Row, compute: Compute) -> int:
    """Bytes of the hidden states of a rank's part of the row."""
    return a.hidden_size * _tokens(parallel, row) // parallel.tensor * compute.element_bytes
