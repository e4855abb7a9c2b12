"""Bytes of activations that a rank holds while it trains: those that forward keeps for backward, and temporary ones.

Counted tensor by tensor as megatron-core 0.19.2 and the two layer backends save them. Names of sizes, all of one rank:
T tokens of the context shard of a row, L of them after sequence parallelism, R rows routed to the rank's experts,
Q width of its query heads, K of its key heads (and of its value heads), F of its feed-forward layer or expert.

tests/mesh/test_planned_memory.py compares the torch backend with tensors counted during real updates, and
benchmarks/plan_run.md compares Transformer Engine's part with rehearsed ranks (docs/rehearsal.md); no GPU has confirmed
it.
"""

from dataclasses import dataclass

from minpro_megatron.config.model import RecomputedModule, recomputed_modules
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.planning.parameters import layers_of_chunk

# (gathered tokens, vocabulary columns) of a block of logits, the same as in parallel/log_probs.py.
LOGIT_BLOCKS = {"cpu": (1024, 2048), "cuda": (8192, 8192)}
FLOAT32 = 4


@dataclass(frozen=True)
class Row:
    """A micro-batch: one packed row of `tokens`, made of sequences of `sequence_tokens`."""

    tokens: int
    sequence_tokens: int


@dataclass(frozen=True)
class Compute:
    """The properties of the computation that determine how activations are saved."""

    device: str  # cpu or cuda
    element_bytes: int
    fused: bool  # Transformer Engine's layers, else torch's
    recompute: str  # none, selective or full
    expert_imbalance: float  # number of rows of the busiest rank's experts, divided by the mean
    recompute_modules: tuple[RecomputedModule, ...] = ()  # as in config.model.ModelConfig
    recompute_layers: int = 0  # as in config.model.ModelConfig
    top_k: int = 0  # as in config.sampling.SamplingConfig

    def modules(self, mixture: bool) -> tuple[RecomputedModule, ...]:
        """The parts of a layer that are recomputed on their own."""
        if self.recompute != "selective":
            return ()
        return recomputed_modules(self.recompute_modules, self.fused, mixture)


@dataclass(frozen=True)
class LayerActivations:
    """Activations of one layer and one micro-batch, in bytes."""

    inputs: int  # kept with full recomputation
    kept: int  # kept by forward, including the inputs, with no or selective recomputation
    routed: int  # included in kept: rows that were sent to the rank's experts
    backward: int  # additional, while the layer's backward runs or, before it, its recomputed forward


@dataclass(frozen=True)
class StageActivations:
    """Activations of one rank of a pipeline stage, in bytes."""

    micro_batches: float  # in flight at once; of an interleaved schedule, in runs of layers over the stage's number
    saved: int  # by the forward passes of the micro-batches in flight, at the end of a forward pass
    at_the_end: int  # included in saved, and not there while a layer is computed
    routed: int  # included in saved: rows sent to experts
    backward: int  # additional, as of a layer; includes the recomputed layer without its inputs, which are saved
    logits: int  # additional, while log-probs or their gradient are computed

    @property
    def peak(self) -> int:
        return self.saved + max(self.backward - self.at_the_end, self.logits)


def layer_activations(
    a: Architecture, parallel: ParallelConfig, row: Row, compute: Compute, mixture: bool
) -> LayerActivations:
    """`mixture`: the layer has experts."""
    tokens = row.tokens // parallel.context
    local = tokens // parallel.tensor
    element = compute.element_bytes
    attention = _attention(a, parallel, row, compute)
    feed_forward = _mixture if mixture else _dense_feed_forward
    routed, rest, backward = feed_forward(a, parallel, tokens, local, compute)
    hidden = a.hidden_size * local * element
    modules = compute.modules(a.num_experts > 0)
    if compute.fused:
        norms = 2 * hidden  # their outputs; their inputs are the residual stream
    else:
        # torch's norm computes in float32 and also keeps the normalised input
        norms = 2 * hidden + 2 * a.hidden_size * local * FLOAT32
        norms += 0 if element == FLOAT32 else 2 * a.hidden_size * local * FLOAT32
    if "layernorm" in modules and (
        mixture or not compute.fused
    ):  # Transformer Engine's first norm is a part of the projection after it
        again = hidden if compute.fused else norms
        norms, backward = norms - again, backward + again
    elif "mlp" in modules and compute.fused:  # the second norm is a part of the feed-forward layer
        norms, backward = norms - hidden, backward + hidden
    residual = 2 * hidden  # before attention and before the feed-forward layer
    return LayerActivations(
        inputs=hidden, kept=residual + norms + attention + routed + rest, routed=routed, backward=backward
    )


def _attention(a: Architecture, parallel: ParallelConfig, row: Row, compute: Compute) -> int:
    tokens = row.tokens // parallel.context
    queries = a.num_attention_heads * a.head_dim // parallel.tensor
    # ranks share a key head if there are fewer heads than ranks
    keys = max(a.num_query_groups // parallel.tensor, 1) * a.head_dim
    heads = a.num_attention_heads // parallel.tensor
    if compute.fused:
        # rotated queries and keys, a copy of the values, output; nothing keeps the joint projection
        elements = (queries + keys) + keys + queries
        elements += (queries + keys) * a.qk_norm  # the norms' inputs, which are copies too
        if a.rope_scaling is not None and a.rope_scaling.attention_factor != 1:
            elements += 4 * a.rotary_dim  # the rotation is not fused, and keeps its cosines and sines
        inside = 0
        statistics = heads + (heads + keys // a.head_dim) * a.qk_norm  # of softmax and of the norms
    else:
        # the norms keep the joint projection, the queries made contiguous, and the normalised queries and keys; else
        # only the output is kept, because the rotation and the layout in blocks need no inputs in backward
        elements = queries + ((queries + 2 * keys) + queries + (queries + keys)) * a.qk_norm
        # laid out as [sequence, position] blocks: queries, keys and values of all context ranks, output
        inside = 2 * queries + 2 * keys * parallel.context
        statistics = heads + (heads + keys // a.head_dim) * a.qk_norm + 2 + 4 * a.rotary_dim  # and rotary angles
        if parallel.context > 1:
            inside += row.sequence_tokens  # a mask of as many columns
    if "core_attn" in compute.modules(a.num_experts > 0):
        # attention's inputs instead of its saved tensors
        inside = 0 if compute.fused else queries + keys
        statistics -= heads
    return tokens * ((elements + inside) * compute.element_bytes + statistics * FLOAT32)


def _dense_feed_forward(
    a: Architecture, parallel: ParallelConfig, tokens: int, local: int, compute: Compute
) -> tuple[int, int, int]:
    """(0, for rows sent to experts; bytes kept; additional bytes in backward)."""
    kept, backward = _gated(a, a.ffn_hidden_size // parallel.tensor, tokens, local, compute)
    if "mlp" in compute.modules(a.num_experts > 0):
        kept, backward = 0, backward + kept
    return 0, kept, backward


def _gated(a: Architecture, width: int, tokens: int, local: int, compute: Compute) -> tuple[int, int]:
    """(bytes kept, additional bytes in backward) of a gated network that all tokens pass."""
    element = compute.element_bytes
    kept = (3 if compute.fused else 5) * width * tokens * element
    # the gradients of gate and up projection; or before, that of their product, beside those of the network's result:
    # of the layer, of the network and, gathered from the tensor ranks, of all tokens
    gathered = a.hidden_size * (tokens + local) if local < tokens else 0
    return kept, (max(2 * width * tokens, width * tokens + gathered) + a.hidden_size * local) * element


def _mixture(
    a: Architecture, parallel: ParallelConfig, tokens: int, local: int, compute: Compute
) -> tuple[int, int, int]:
    """(bytes of rows sent to experts, other bytes kept, additional bytes in backward)."""
    element = compute.element_bytes
    width = a.expert_ffn_hidden_size // parallel.expert_tensor
    # a rank gets as many rows as it sends; those of expert-tensor ranks come together
    spread = compute.expert_imbalance if parallel.expert > 1 else 1.0
    sent = local * a.num_experts_per_token
    rows = round(sent * parallel.expert_tensor * spread)
    activation = rows * width * element if "moe_act" in compute.modules(mixture=True) else 0
    routed = rows * (a.hidden_size + (3 if compute.fused else 5) * width) * element - activation
    if compute.fused:
        # for every token two places with each expert, and one number; of the chosen experts index and probability
        router = local * (2 * a.num_experts + 1) * 4 + local * a.num_experts_per_token * (8 + FLOAT32)
    else:  # logits, probabilities and the routing map
        router = local * a.num_experts * (3 * FLOAT32 + 8) + 2 * 8 * local * a.num_experts_per_token
    backward = rows * (2 * width + 2 * a.hidden_size) * element + activation
    if parallel.expert > 1:
        # at the end of forward megatron still holds the rows as sent, as received, as the experts' results, and as
        # these are sorted to be sent back
        routes = local * a.num_experts * (FLOAT32 + 1)  # probabilities and the routing map
        backward = max(backward, (sent + 3 * rows) * a.hidden_size * element + routes * compute.fused)
    if a.shared_ffn_hidden_size:
        shared, _ = _gated(a, a.shared_ffn_hidden_size // parallel.tensor, tokens, local, compute)
        router += shared
    return routed, router, backward


def logit_bytes(a: Architecture, parallel: ParallelConfig, row: Row, compute: Compute) -> int:
    """Additional bytes while the last stage computes log-probs or their gradient: blocks of logits and, in backward,
    the float32 sums behind the gradients of hidden states and output layer, and at last the latter in the weight's
    dtype."""
    block_tokens, block_columns = LOGIT_BLOCKS[compute.device]
    tokens = min(block_tokens, row.tokens // parallel.context)
    columns = a.padded_vocab_size // parallel.tensor
    block = tokens * min(block_columns, columns)
    kept = kept_id_bytes(row.tokens // parallel.context, tokens, block, parallel.tensor, compute.top_k)
    if compute.device == "cpu":
        return 4 * block * FLOAT32 + kept  # logits, and the inputs of exponentials and sums; not one kernel
    sums = columns * a.hidden_size * FLOAT32
    hidden = tokens * a.hidden_size * (FLOAT32 + compute.element_bytes)
    own = row.tokens // parallel.context // parallel.tensor * a.hidden_size * compute.element_bytes
    blocks = block * (FLOAT32 + compute.element_bytes)
    return sums + own + hidden + max(blocks, columns * a.hidden_size * compute.element_bytes) + kept


def kept_id_bytes(row_tokens: int, chunk_tokens: int, block: int, tensor: int, top_k: int) -> int:
    """Bytes at most for the kept ids of a context shard of `row_tokens` (parallel/kept_columns.py): one int32 for each,
    and for those of a chunk three int64; a bool for each logit of a `block`. 0 without support replay."""
    return (row_tokens * 4 + chunk_tokens * 3 * 8) * top_k // tensor + block if top_k else 0


def stage_activations(
    a: Architecture, parallel: ParallelConfig, row: Row, num_micro_batches: int, compute: Compute, stage: int
) -> StageActivations:
    """`num_micro_batches`: number per data-parallel rank and update."""
    layers = _stage_layers(a, parallel, row, compute, stage)
    in_flight = _in_flight(parallel, stage, num_micro_batches)
    local = row.tokens // parallel.context // parallel.tensor
    hidden = a.hidden_size * local * compute.element_bytes
    saved = in_flight * sum(layer.inputs if again else layer.kept for layer, again in layers)
    last = stage == parallel.pipeline - 1
    at_the_end = hidden  # the last layer's output
    if last:
        # the final norm's output and, with torch's layers, its normalised input
        at_the_end += hidden + (0 if compute.fused else hidden // compute.element_bytes * FLOAT32)
    saved += at_the_end
    if compute.fused:
        saved += parallel.virtual_pipeline * row.sequence_tokens * a.head_dim * FLOAT32  # rotary angles, which stay
    if parallel.pipeline > 1:
        # received from, or sent to, the neighbouring stages; messages that overlap with computation are received early
        saved += (2 if parallel.virtual_pipeline == 1 else 3) * hidden
    # and those of the chunk before are still being sent
    overlapping = 2 * hidden if parallel.virtual_pipeline > 1 else 0
    # a layer that is computed again has its output's gradient already
    output = hidden if a.num_experts else 0
    return StageActivations(
        micro_batches=in_flight,
        saved=round(saved),
        at_the_end=at_the_end,
        routed=round(in_flight * sum(layer.routed for layer, again in layers if not again)),
        backward=overlapping
        + max(layer.backward + again * (layer.kept - layer.inputs + output) for layer, again in layers),
        logits=logit_bytes(a, parallel, row, compute) if last else 0,
    )


def _stage_layers(
    a: Architecture, parallel: ParallelConfig, row: Row, compute: Compute, stage: int
) -> list[tuple[LayerActivations, bool]]:
    """(activations, whether it is recomputed as a whole) of each layer of the stage."""
    found = []
    for chunk in parallel.chunks_of_stage(stage):
        plain, mixtures = layers_of_chunk(a, parallel, chunk)
        again = recomputed_layers(compute.recompute, compute.recompute_layers, plain + mixtures)
        of_kind = {kind: layer_activations(a, parallel, row, compute, mixture=kind) for kind in (False, True)}
        found += [(of_kind[index >= plain], index < again) for index in range(plain + mixtures)]
    return found


def recomputed_layers(recompute: str, chosen: int, layers: int) -> int:
    """The number of `layers`, those of a model chunk, that are recomputed as a whole. `chosen`:
    model.recompute_layers."""
    if recompute != "full":
        return 0
    return min(chosen, layers) if chosen else layers


def _in_flight(parallel: ParallelConfig, stage: int, num_micro_batches: int) -> float:
    """Number of micro-batches whose activations a stage holds at the same time in megatron's one-forward-one-backward
    schedules."""
    if parallel.virtual_pipeline == 1:
        return min(num_micro_batches, parallel.pipeline - stage)
    # warm-up forward passes of the interleaved schedule, each through one model chunk, and the current one
    runs = 2 * (parallel.pipeline - stage - 1) + (parallel.virtual_pipeline - 1) * parallel.pipeline + 1
    return min(num_micro_batches, runs / parallel.virtual_pipeline)
