"""The memory of a run: on every trainer rank, on a server's GPU, and on the host of a trainer node."""

from dataclasses import dataclass

from minpro_megatron.config.model import layer_backend_of
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.planning.activations import Compute, Row, StageActivations, stage_activations
from minpro_megatron.planning.canaries import canary_bytes
from minpro_megatron.planning.gpus import GIB, GpuKind
from minpro_megatron.planning.parameters import (
    model_parameters,
    optimizer_degrees,
    projection_shapes,
    stage_parameters,
)
from minpro_megatron.planning.routes import route_host_bytes
from minpro_megatron.planning.server_share import static_share

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
GRADIENT_BYTES = 4  # float32
# Assumptions, not measured here. In addition to tensors: CUDA context, buffers of NCCL and cuBLAS, and fragmentation of
# the caching allocator (PyTorch's notes on memory management).
CONTEXT_BYTES = {"cuda": 3 * GIB, "cpu": 0}
ALLOCATOR_SHARE = 0.05
PROCESS_HOST_BYTES = {"cuda": 4 * GIB, "cpu": GIB}  # of a rank: interpreter, libraries, pinned buffers
# Transformer Engine keeps a workspace of cuBLAS for products, and four for those of experts, from the first pass on:
# 32 MiB and 1 KiB each on Hopper and Blackwell, 4 MiB on other GPUs (2.20.2, pytorch/cpp_extensions/gemm.py:46).
WORKSPACE_BYTES = 32 * 2**20 + 1024
GROUPED_WORKSPACES = 4
EXPERT_IMBALANCE = 1.3  # without an auxiliary loss the experts are unbalanced: rows of the busiest rank over the mean


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of each trainer rank of the pipeline stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: StageActivations
    publish: int  # buckets of a broadcast on rank 0, outside training
    canaries: int  # scoring of what servers generate after a publication, outside training
    building: int  # total of tensors at the start, while weights and their copy in megatron's buffers exist
    workspaces: int  # of Transformer Engine, which stay, and the gradients that it gives autograd instead of real ones
    context: int  # outside the allocator
    fragments: int

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        tensors = max(self.states + self.workspaces + max(self.activations.peak, self.publish), self.building)
        return tensors + self.context + self.fragments


@dataclass(frozen=True)
class ServerMemory:
    """Bytes on each GPU of a server, and the number of KV cache tokens."""

    weights: int
    kv_bytes_per_token: int  # on one GPU
    kv_tokens: int  # that fit, or the number in the settings
    kv_cache: int
    update: int  # a bucket of new weights; 0 where it is read from shared memory
    total: int  # of the static part, and the share that SGLang reserves

    @property
    def fits(self) -> bool:
        return self.kv_tokens > 0


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the host of a node with trainer ranks."""

    ranks: int
    snapshots: int  # earlier weights, and the current ones while earlier weights are loaded
    checkpoint: int  # while one is written in the background: a copy of it (benchmarks/checkpoint_memory.md)
    offloaded: int  # optimizer.cpu_offload
    parked: int  # server.placement = shared: weights and optimizer states while servers use the GPUs
    routes: int  # and kept ids: model.routing_replay and sampling.top_k
    buckets: int  # publish.transport = shared_memory
    processes: int

    @property
    def total(self) -> int:
        of_states = self.snapshots + self.checkpoint + self.offloaded + self.parked
        return of_states + self.routes + self.buckets + self.processes


def compute_of(config: RunConfig, expert_imbalance: float = EXPERT_IMBALANCE) -> Compute:
    model = config.model
    fused = layer_backend_of(model.backend, config.device, model.dtype) == "transformer_engine"
    return Compute(
        config.device,
        ELEMENT_BYTES[model.dtype],
        fused,
        model.recompute,
        expert_imbalance,
        model.recompute_modules,
        model.recompute_layers,
        config.sampling.top_k,
    )


def _owned_parameters(config: RunConfig, a: Architecture, stage: int) -> int:
    """The number of parameters that each rank of a stage updates."""
    held = stage_parameters(a, config.parallel, stage)
    dense_ranks, expert_ranks = optimizer_degrees(config.parallel)
    return -(-held.dense // dense_ranks) + -(-held.experts // expert_ranks)


def checkpoint_bytes(config: RunConfig, a: Architecture, stage: int) -> int:
    """Bytes that each rank of a stage writes: for the parameters that it updates, the weights, their float32 copy (also
    for float32 weights) and two moments."""
    return _owned_parameters(config, a, stage) * (ELEMENT_BYTES[config.model.dtype] + 12)


def state_bytes(config: RunConfig, a: Architecture, stage: int) -> tuple[int, int, int, int]:
    """Bytes of (weights, gradients, optimizer on the device, optimizer on the host) of each rank of a stage.

    The distributed optimizer shards its states over the ranks that hold the same parameters. bfloat16 weights have a
    float32 copy and two moments; float32 weights are their own copy.
    """
    held, states = stage_parameters(a, config.parallel, stage), _owned_parameters(config, a, stage)
    element = ELEMENT_BYTES[config.model.dtype]
    each = 8 if element == 4 else 12
    offload = config.optimizer.cpu_offload
    on_host = round(offload * states * (each + GRADIENT_BYTES))  # gradients are copied there too
    return held.total * element, held.total * GRADIENT_BYTES, round((1 - offload) * states * each), on_host


def building_bytes(config: RunConfig, a: Architecture, stage: int) -> int:
    """Bytes on a rank of the stage while megatron copies its weights into buffers and makes those of the gradients:
    first the dense parameters, whose originals are then released, then the experts; then the optimizer's float32 copies
    are made. Where a part of the optimizer is in host memory, Megatron first copies whole parameters, not shards."""
    held, element = stage_parameters(a, config.parallel, stage), ELEMENT_BYTES[config.model.dtype]
    both = held.total * (element + GRADIENT_BYTES)
    dense = held.total * element + held.dense * (element + GRADIENT_BYTES)
    offload = config.optimizer.cpu_offload
    copied = _owned_parameters(config, a, stage) + (held.total if offload else 0)
    copies = 0 if element == 4 else round((1 - offload) * copied * 4)
    return max(dense, both + held.experts * element, both + copies)


def workspace_bytes(config: RunConfig, a: Architecture) -> int:
    """Bytes that Transformer Engine keeps on every rank from the first update on; 0 for torch's layers. Products that
    add to the float32 gradients give autograd a tensor without meaning, one for each shape of a weight (2.20.2,
    pytorch/module/base.py:134)."""
    if not compute_of(config).fused:
        return 0
    found = (1 + (GROUPED_WORKSPACES if a.num_experts else 0)) * WORKSPACE_BYTES
    if config.model.megatron.get("gradient_accumulation_fusion", True) and config.device == "cuda":
        shapes = set(projection_shapes(a, config.parallel.tensor, config.parallel.expert_tensor))
        found += sum(rows * columns for rows, columns in shapes) * ELEMENT_BYTES[config.model.dtype]
    return found


def largest_bucket_bytes(config: RunConfig, a: Architecture) -> int:
    """A parameter that is larger than a bucket is sent as a bucket of its own."""
    vocabulary = a.padded_vocab_size * a.hidden_size
    dense = a.ffn_hidden_size if a.expert_layers < a.num_layers else 0
    feed_forward = 2 * a.hidden_size * max(dense, a.shared_ffn_hidden_size)  # gate and up projection
    return max(config.publish.bucket_bytes, max(vocabulary, feed_forward) * ELEMENT_BYTES[config.model.dtype])


def shared_bucket_bytes(config: RunConfig, a: Architecture) -> int:
    """Bytes of the two buckets of publish.transport = shared_memory, in the memory of rank 0's host; 0 for others."""
    if config.publish.transport != "shared_memory":
        return 0
    whole = model_parameters(a) * ELEMENT_BYTES[config.model.dtype]
    return 2 * min(whole, largest_bucket_bytes(config, a))


def publish_bytes(config: RunConfig, a: Architecture, stage: int) -> int:
    """Bytes on a rank of the stage, in addition to its states, while weights are published. On stage 0 they are rank
    0's, which gathers the model; other ranks hold the shards that they send."""
    bucket, tensor = config.publish.bucket_bytes, config.parallel.tensor
    largest = largest_bucket_bytes(config, a)
    if stage > 0:
        return largest // tensor
    received = largest if config.parallel.pipeline > 1 else largest - largest // tensor
    merged = largest if tensor > 1 else 0
    if config.publish.transport == "shared_memory":  # its buffers are in the host's memory
        return received + merged
    # The buffer being sent and the one before it, and the next bucket in shards and as whole parameters; then the
    # shards are released, and the bucket is copied into the older buffer, which may have to be as large.
    return max(largest + bucket + received + merged, 2 * largest + max(received, merged))


def rank_memory(
    config: RunConfig, a: Architecture, row: Row, num_micro_batches: int, stage: int, imbalance: float
) -> RankMemory:
    compute = compute_of(config, imbalance)
    weights, gradients, optimizer, _ = state_bytes(config, a, stage)
    activations = stage_activations(a, config.parallel, row, num_micro_batches, compute, stage)
    return RankMemory(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        publish=publish_bytes(config, a, stage),
        canaries=canary_bytes(config, a, compute, stage),
        building=building_bytes(config, a, stage),
        workspaces=workspace_bytes(config, a),
        context=CONTEXT_BYTES[config.device],
        fragments=round(ALLOCATOR_SHARE * (weights + gradients + optimizer + activations.peak)),
    )


def server_memory(config: RunConfig, a: Architecture, gpu: GpuKind) -> ServerMemory:
    server = config.server
    element = ELEMENT_BYTES[server.dtype]
    weights = model_parameters(a) * element // server.tensor_parallel
    # ranks hold whole key heads
    groups = max(1, a.num_query_groups // server.tensor_parallel)
    per_token = 2 * a.num_layers * groups * a.head_dim * element
    update = 0 if config.publish.transport == "shared_memory" else largest_bucket_bytes(config, a)
    static = static_share(server, gpu.memory_bytes) if server.memory_fraction is None else server.memory_fraction
    free = round(static * gpu.memory_bytes) - weights
    fitting = max(0, free // per_token)
    tokens = min(fitting, server.max_total_tokens or fitting)
    used = weights + tokens * per_token
    return ServerMemory(
        weights=weights,
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
        kv_cache=tokens * per_token,
        update=update,
        total=used + round((1 - static) * gpu.memory_bytes),
    )


def host_memory(config: RunConfig, a: Architecture, ranks_per_node: int, batch_tokens: float) -> HostMemory:
    """`batch_tokens`: tokens of a global step's batch, including prompts."""
    weights, _, optimizer, offloaded = state_bytes(config, a, 0)
    settings, in_turns = config.staleness, config.server.takes_turns
    copies = 1 if settings.mode == "delay" else settings.max_staleness + 1
    if in_turns:  # a batch is scored before the weights that sampled it change
        copies = 0
    if settings.mode == "bounded" or (settings.delay_steps and not in_turns) or config.loss.kl.enabled:
        copies += 1  # for the current weights meanwhile
    copies += config.loss.kl.enabled
    saves = config.checkpoint.saves_before_end or config.checkpoint.at_end
    copied = saves and config.checkpoint.asynchronous
    return HostMemory(
        ranks=ranks_per_node,
        snapshots=ranks_per_node * copies * weights,
        checkpoint=ranks_per_node * checkpoint_bytes(config, a, 0) if copied else 0,
        offloaded=ranks_per_node * offloaded,
        parked=ranks_per_node * (weights + optimizer) if in_turns else 0,
        routes=route_host_bytes(config, a, batch_tokens, ranks_per_node),
        buckets=shared_bucket_bytes(config, a),
        processes=ranks_per_node * PROCESS_HOST_BYTES[config.device],
    )
