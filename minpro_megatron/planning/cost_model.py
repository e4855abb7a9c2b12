"""The durations of the parts of a global step, from data sheets and a few published measurements.

Every constant states its source. None was fitted to the reinforcement-learning runs that benchmarks/plan_run.py
compares the model with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from minpro_megatron.actor.flops import forward_flops
from minpro_megatron.config.model import layer_backend_of, recomputed_modules
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.planning.activations import recomputed_layers
from minpro_megatron.planning.gpus import GpuKind
from minpro_megatron.planning.memory import ELEMENT_BYTES, ServerMemory, checkpoint_bytes, state_bytes
from minpro_megatron.planning.parameters import active_parameters, optimizer_degrees, stage_parameters
from minpro_megatron.planning.turns import moving_times
from minpro_megatron.planning.update_rows import update_rows


@dataclass(frozen=True)
class Calibration:
    """Constants of the model. Shares are relative to the data sheet's figure."""

    # Megatron-LM's README: 41 to 47 % of the peak for dense GPT models in bfloat16 on H100, end to end.
    product_share: float = 0.45
    # Time in addition to the products for rows that are sent to experts (permuting, small grouped products, waiting for
    # the host), forward and backward, as passes over those rows at memory bandwidth. Megatron-Bridge 26.02,
    # Qwen3-30B-A3B dropless on 16 H100 (PP 2, EP 8): 5,113 tokens/s per GPU at 118 TFLOPS. GPT-OSS 120B on 64 H100
    # (5,993 tokens/s, 163 TFLOPS) gives 1.4 times as many.
    routed_passes: float = 276.0
    # nccl-tests on NVLink and 400 Gb/s InfiniBand reach 75 to 85 % of the wire.
    link_share: float = 0.75
    host_link_share: float = 0.6
    # Decoding reads weights and KV cache at this share of memory bandwidth. ml.energy's leaderboard, Qwen3-14B in
    # bfloat16 on a B200: 7.16 ms per token at 8 responses. Check: Qwen3-8B in float8 on an H100, 472 responses
    # (silybench, 128 + 1,024 tokens): 31 ms measured, 28 ms by this model.
    decode_share: float = 0.6
    # Kernel launches and scheduling per layer. The same B200 figure; Qwen3-30B-A3B on an A100, one response: 9.6 ms per
    # token (tt-inference-server, issue 340).
    decode_dense_layer_s: float = 35e-6
    decode_mixture_layer_s: float = 95e-6
    # Two all-reduces per layer of a tensor-parallel server, each with the latency of a small message.
    decode_all_reduce_s: float = 12e-6
    prefill_share: float = 0.45
    # verl's checkpoint engine on H20, Qwen3-30B-A3B from 16 to 16 ranks: 61.06 GB in 4.38 s.
    publish_bytes_per_s: float = 13.9e9
    publish_fixed_s: float = (
        2.0  # lease, checksums, canary, in addition to the pause: this project's publish benchmark, rounded up
    )
    # Rank 0 copies a bucket to pageable host memory while every server copies the previous one to its GPU. Not measured
    # here: a tenth of the data sheets' 64 GB/s of PCIe 5.0, because such copies are made by one thread of the host and
    # all servers read at once.
    shared_memory_bytes_per_s: float = 6.4e9
    # Of each turn: pausing, flushing, releasing and resuming memory, without copies. An assumption, not measured.
    handover_s: float = 2.0
    update_fixed_s: float = 0.05  # packing, collating, metrics of an update
    disk_bytes_per_s: float = 2e9  # a node's share of a parallel file system


@dataclass(frozen=True)
class StepCost:
    """Seconds of a global step on the trainer."""

    score: float
    train: float
    publish: float
    pause: float  # included in publish: the servers are paused
    release: float  # on shared GPUs: the servers release their memory, and the trainer's states return to the device
    moving: float  # included in publish and release: copies of states between device and host
    checkpoint: float  # of a step with a save
    checkpoint_written: float  # from the start of a save until its files are written
    update: float  # one of train's
    # of train
    products: float
    routing: float
    communication: float
    again: float  # included in train: recomputation and an objective's survey
    bubble: float
    imbalance: float  # until the busiest data-parallel ranks are done, padding included
    optimizer: float
    updates: int
    micro_batches: int  # per data-parallel rank and update


@dataclass(frozen=True)
class Batch:
    """A global step's tokens."""

    sequence_tokens: Sequence[int]  # prompt and response tokens of a sample of the sequences
    num_sequences: int

    @property
    def tokens(self) -> float:
        return self.num_sequences * sum(self.sequence_tokens) / len(self.sequence_tokens)

    def sample(self, count: int) -> list[int]:
        """`count` sequences, evenly over the lengths."""
        known = len(self.sequence_tokens)
        return [self.sequence_tokens[(2 * place + 1) * known // (2 * count)] for place in range(count)]


@dataclass(frozen=True)
class TrainerCost:
    config: RunConfig
    architecture: Architecture
    gpu: GpuKind
    gpus_per_node: int
    calibration: Calibration

    def _recomputed(self, forward: float, attention: float, products: float) -> float:
        """Seconds of recomputation, from those of one forward pass and of its parts."""
        model, a = self.config.model, self.architecture
        if model.recompute == "full":
            chunks = self.config.parallel.chunk_layers(a.num_layers)
            layers = sum(recomputed_layers("full", model.recompute_layers, chunk) for chunk in chunks)
            return forward * layers / a.num_layers
        if model.recompute == "none":
            return 0.0
        fused = layer_backend_of(model.backend, self.config.device, model.dtype) == "transformer_engine"
        modules = recomputed_modules(model.recompute_modules, fused, a.num_experts > 0)
        # norms and activations read and write memory only, in a small share of the time
        dense = a.num_layers - a.expert_layers
        feed_forward = dense * 3 * a.hidden_size * a.ffn_hidden_size / active_parameters(a)
        return attention * ("core_attn" in modules) + products * feed_forward * ("mlp" in modules)

    def step(self, batch: Batch) -> StepCost:
        config, parallel = self.config, self.config.parallel
        updates = config.batch.updates_per_step
        rows = update_rows(config, self.architecture, batch.sample(batch.num_sequences // updates))
        products, attention = self._products(batch)
        routing = self._routing(batch)
        communication = self._communication(batch)
        forward = (products + routing + communication) / 3 * (1 + rows.surplus)
        again = self._recomputed(forward, attention / 3, products / 3)
        again += forward * config.objective.surveys_mini_batch
        busy = 3 * forward + again
        bubble_share = (parallel.pipeline - 1) / parallel.virtual_pipeline / rows.micro_batches
        optimizer = updates * self._optimizer()
        fixed = updates * self.calibration.update_fixed_s
        train = busy * (1 + bubble_share) + optimizer + fixed
        extra_passes = config.loss.kl.enabled + config.loss.decoupled.enabled
        in_turns = config.server.takes_turns
        train += extra_passes * forward * (1 + bubble_share) + self._snapshot(0 if in_turns else 1)
        score, swaps = self._scores()
        moving = moving_times(config, self.architecture, self.gpu, self.calibration.host_link_share)
        handover = self.calibration.handover_s if in_turns else 0.0
        return StepCost(
            score=score * forward * (1 + bubble_share)
            + self._snapshot(swaps),  # one mini-batch at a time, as for updates
            train=train,
            publish=self._pause() + self.calibration.publish_fixed_s + handover + moving.to_host,
            pause=self._pause(),
            release=handover + moving.to_device,
            moving=moving.to_host + moving.to_device,
            checkpoint=self._checkpoint()[0],
            checkpoint_written=self._checkpoint()[1],
            update=train / updates,
            products=products,
            routing=routing,
            communication=communication,
            again=again,
            bubble=busy * bubble_share,
            imbalance=(products + routing + communication) * rows.surplus,
            optimizer=optimizer,
            updates=updates,
            micro_batches=rows.micro_batches,
        )

    def _products(self, batch: Batch) -> tuple[float, float]:
        """(seconds of all matrix products, seconds of those of attention), forward and backward."""
        cost = forward_flops(self.architecture)
        lengths = batch.sequence_tokens
        scale = 3 * batch.num_sequences / len(lengths)
        all_flops = scale * sum(cost.of(length) for length in lengths)
        attention_flops = scale * sum(cost.quadratic * length**2 for length in lengths)
        rate = self.config.parallel.world_size * self.gpu.flops * self.calibration.product_share
        return all_flops / rate, attention_flops / rate

    def _routing(self, batch: Batch) -> float:
        a = self.architecture
        if not a.num_experts:
            return 0.0
        element = ELEMENT_BYTES[self.config.model.dtype]
        moved = batch.tokens * a.expert_layers * a.num_experts_per_token * a.hidden_size * element
        return moved * self.calibration.routed_passes / (self.config.parallel.world_size * self.gpu.memory_bandwidth)

    def _communication(self, batch: Batch) -> float:
        """Seconds of communication on the tensor, context and expert axes, forward and backward."""
        a, p = self.architecture, self.config.parallel
        element = ELEMENT_BYTES[self.config.model.dtype]
        layers = a.num_layers / p.pipeline
        tokens = batch.tokens * p.tensor * p.pipeline / p.world_size  # of a context shard, over the whole step
        shard = tokens * a.hidden_size * element
        seconds = 0.0
        if p.tensor > 1:  # four gathers and scatters in forward, six in backward, around attention and feed-forward
            seconds += 10 * layers * shard * (p.tensor - 1) / p.tensor / self._link(p.tensor)
        if p.context > 1:  # keys and values around the ring, and their gradients
            keys = 2 * max(a.num_query_groups // p.tensor, 1) * a.head_dim * element
            seconds += 3 * layers * tokens * keys * (p.context - 1) / self._link(p.tensor * p.context)
        if a.num_experts and p.expert * p.expert_tensor > 1:  # dispatch and return, twice
            rows = shard / p.tensor * a.num_experts_per_token * p.expert_tensor
            seconds += (
                4 * a.expert_layers / p.pipeline * rows * (1 - 1 / p.expert) / self._link(p.expert * p.expert_tensor)
            )
        return seconds

    def _link(self, ranks: int) -> float:
        """Bytes per second between `ranks` neighbouring ranks."""
        gpu = self.gpu
        wire = gpu.node_bandwidth if ranks <= self.gpus_per_node else gpu.network_bandwidth
        return wire * self.calibration.link_share

    def _optimizer(self) -> float:
        """Seconds of an update's gradient reduction, AdamW and weight gathering on the first stage."""
        config, p = self.config, self.config.parallel
        held = stage_parameters(self.architecture, p, 0)
        element = ELEMENT_BYTES[config.model.dtype]
        dense_ranks, expert_ranks = optimizer_degrees(p)
        link = self._link(p.world_size)
        seconds = 0.0
        for count, ranks in ((held.dense, dense_ranks), (held.experts, expert_ranks)):
            seconds += count * (4 + element) * (ranks - 1) / ranks / link
            # gradients are cleared, read for the norm and for the step; three states are read and written
            seconds += (4 * count + (8 + 24 + element) * count / ranks) / self.gpu.memory_bandwidth
        _, _, _, on_host = state_bytes(config, self.architecture, 0)
        return seconds + 2 * on_host / (self.gpu.host_bandwidth * self.calibration.host_link_share)

    def _scores(self) -> tuple[float, int]:
        """(forward passes over a batch, copies of the weights between host and device)."""
        settings = self.config.staleness
        if settings.behavior_log_probs == "rollout":
            return 0.0, 0
        if settings.mode == "bounded":
            # a response spans one or two publications; each version is scored separately, on its rows
            return 2.0, 3 * min(2, settings.max_staleness)
        # in turns a batch is scored before the weights that sampled it change
        return 1.0, 3 if settings.delay_steps and not self.config.server.takes_turns else 0

    def _snapshot(self, copies: int) -> float:
        weights = state_bytes(self.config, self.architecture, 0)[0]
        return copies * weights / (self.gpu.host_bandwidth * self.calibration.host_link_share)

    def _pause(self) -> float:
        """Seconds for which servers sample nothing because new weights arrive."""
        element = ELEMENT_BYTES[self.config.server.dtype]
        model = stage_parameters(self.architecture, ParallelConfig(), 0).total * element
        known = self.calibration
        rate = {
            "broadcast": known.publish_bytes_per_s,
            "shared_memory": known.shared_memory_bytes_per_s,
            "disk": known.disk_bytes_per_s,
        }[self.config.publish.transport]
        return model / min(rate, self.gpu.node_bandwidth)

    def _checkpoint(self) -> tuple[float, float]:
        """Seconds for which a save delays training, and seconds until its files are written."""
        checkpoint = self.config.checkpoint
        states = checkpoint_bytes(self.config, self.architecture, 0)
        copied = states / (self.gpu.host_bandwidth * self.calibration.host_link_share)
        ranks = min(self.gpus_per_node, self.config.parallel.world_size)
        written = copied + ranks * states / self.calibration.disk_bytes_per_s
        held_up = copied if checkpoint.asynchronous else written
        return (held_up if checkpoint.saves_before_end else 0.0), written


@dataclass(frozen=True)
class DecodingServer:
    """A server's iteration as memory traffic, computation and overhead (planning.simulated_server.ServerModel)."""

    config: RunConfig
    architecture: Architecture
    gpu: GpuKind
    memory: ServerMemory
    calibration: Calibration
    num_servers: int
    mean_context: float  # tokens of a response in progress, for the number that fits into the KV cache

    @property
    def max_running(self) -> int:
        fitting = int(self.memory.kv_tokens / self.mean_context)
        return max(1, min(self.config.server.max_running_requests, fitting))

    @property
    def kv_tokens(self) -> int:
        return self.memory.kv_tokens

    @cached_property
    def _active(self) -> int:
        return active_parameters(self.architecture)

    @cached_property
    def _expert(self) -> int:
        """Number of parameters of one expert over all layers."""
        a = self.architecture
        return 3 * a.hidden_size * a.expert_ffn_hidden_size * a.expert_layers

    @cached_property
    def _linear_flops(self) -> float:
        return forward_flops(self.architecture).linear

    def iteration_s(self, running: int, context_tokens: float) -> float:
        weight_bytes, compute_s, overhead_s = self._costs_of(running)
        read = weight_bytes + context_tokens * self.memory.kv_bytes_per_token
        return max(read / (self.gpu.memory_bandwidth * self.calibration.decode_share), compute_s) + overhead_s

    def _costs_of(self, running: int) -> tuple[float, float, float]:
        """What an iteration of `running` responses needs whatever their lengths are: (bytes of weights read, seconds of
        products, seconds of everything else). A simulation asks for few different numbers, and for each many times."""
        if running not in self._known_costs:
            a, tensor, calibration = self.architecture, self.config.server.tensor_parallel, self.calibration
            element = ELEMENT_BYTES[self.config.server.dtype]
            compute_s = 2 * self._active * running / (tensor * self.gpu.flops * calibration.product_share)
            overhead_s = a.expert_layers * calibration.decode_mixture_layer_s
            overhead_s += (a.num_layers - a.expert_layers) * calibration.decode_dense_layer_s
            if tensor > 1:
                message = running * a.hidden_size * element / (self.gpu.node_bandwidth * calibration.link_share)
                overhead_s += 2 * a.num_layers * (calibration.decode_all_reduce_s + message)
            self._known_costs[running] = (self._weights_read(running) * element / tensor, compute_s, overhead_s)
        return self._known_costs[running]

    @cached_property
    def _known_costs(self) -> dict[int, tuple[float, float, float]]:
        return {}

    def _weights_read(self, running: int) -> float:
        """Number of parameters that an iteration reads: for experts, those to which at least one response is sent."""
        a = self.architecture
        if not a.num_experts:
            return self._active
        touched = a.num_experts * (1 - (1 - a.num_experts_per_token / a.num_experts) ** running)
        return self._active + (touched - a.num_experts_per_token) * self._expert

    def prefill_s(self, tokens: float) -> float:
        rate = self.config.server.tensor_parallel * self.gpu.flops * self.calibration.prefill_share
        return tokens * self._linear_flops / rate
