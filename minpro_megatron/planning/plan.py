"""Does a run fit on a cluster, and how long does a step take? Answered before anything is started, without torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.planning.activations import Row
from minpro_megatron.planning.cost_model import Calibration, DecodingServer, StepCost, TrainerCost
from minpro_megatron.planning.gpus import GpuKind, gpu_kind
from minpro_megatron.planning.memory import (
    EXPERT_IMBALANCE,
    HostMemory,
    RankMemory,
    ServerMemory,
    host_memory,
    rank_memory,
    server_memory,
)
from minpro_megatron.planning.simulator import Phases, Simulation, Timeline
from minpro_megatron.planning.workload import GroupLengths, Workload, batch_of
from minpro_megatron.weights.architecture import Architecture, refuse_uneven_cuts
from minpro_megatron.weights.known_models.find import find_architecture

STEADY_STEPS = 4  # that shares and durations are averaged over
SEARCH_STEPS = 2  # the same while splits are compared


@dataclass(frozen=True)
class ClusterSize:
    """The GPUs of a run. Either `trainer_gpus` and `server_gpus`, or `total_gpus`, of which the best split is sought
    (whole nodes for each side where there are several nodes)."""

    gpu: str = "h100-80gb"
    trainer_gpus: int = 0
    server_gpus: int = 0
    total_gpus: int = 0
    gpus_per_node: int = 0  # 0: as many as the kind's usual node has

    def __post_init__(self) -> None:
        given = self.trainer_gpus > 0 and self.server_gpus > 0
        if given == (self.total_gpus > 0) or min(vars(self)[name] for name in vars(self) if name != "gpu") < 0:
            raise ValueError(
                f"cluster: trainer_gpus = {self.trainer_gpus}, server_gpus = {self.server_gpus}, total_gpus = "
                f"{self.total_gpus}: give the first two, or the last alone"
            )

    @property
    def kind(self) -> GpuKind:
        return gpu_kind(self.gpu)

    @property
    def node_size(self) -> int:
        return self.gpus_per_node or self.kind.gpus_per_node


@dataclass(frozen=True)
class SplitTime:
    """A split of the GPUs, and how long a step takes with it."""

    trainer_gpus: int
    server_gpus: int
    step_s: float


@dataclass(frozen=True)
class Plan:
    """What a run takes. Shares and durations are of steps in mid-run."""

    config: RunConfig  # with the mesh and the number of servers that are planned for
    architecture: Architecture
    cluster: ClusterSize
    workload: Workload
    problems: list[str]  # each names field, value, rule and remedy; empty: the run fits
    ranks: list[RankMemory]  # one for each pipeline stage
    server: ServerMemory
    host: HostMemory
    cost: StepCost
    max_running: int  # responses at once on a server
    generation_s: float  # of a batch, from its first group's start to its last one's end
    step_s: float
    wait_share: float  # of the trainer's time: waiting for rollouts
    idle_share: float  # of the servers' time: nothing to do
    timeline: Timeline
    splits: list[SplitTime]  # that were tried, best first; empty where the split was given

    @property
    def num_servers(self) -> int:
        return self.config.server.count

    @property
    def settings(self) -> list[str]:
        """What to put on the run's command line to get the mesh and the servers of this plan."""
        return [f"parallel.data={self.config.parallel.data_size}", f"server.count={self.num_servers}"]


def plan_run(
    config: RunConfig,
    cluster: ClusterSize,
    workload: Workload | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan of `config` on `cluster`. Problems are told in it.

    Raises ValueError for what cannot be planned at all: a model or a kind of GPU that is not known, a mesh that does
    not divide the model, no split that the mesh allows.
    """
    architecture = find_architecture(config.model.hf_path)
    refuse_uneven_cuts(architecture, config.parallel)
    planner = _Planner(architecture, cluster, workload or Workload.of(config), calibration or Calibration())
    if not cluster.total_gpus:
        return planner.plan(config, _size_problems(config, cluster), [])
    tried = [(planner.step_s(one), one) for one in _splits(config, cluster)]
    if not tried:
        raise ValueError(
            f"gpus = {cluster.total_gpus}: no part of them can train: parallel.tensor x pipeline x context = "
            f"{_model_ranks(config.parallel)} ranks, expert x expert_tensor = "
            f"{config.parallel.expert * config.parallel.expert_tensor}, and a server's server.tensor_parallel = "
            f"{config.server.tensor_parallel} do not go into it; give more GPUs, or lower these"
        )
    tried.sort(key=lambda pair: pair[0])
    splits = [
        SplitTime(one.parallel.world_size, one.server.count * one.server.tensor_parallel, step_s)
        for step_s, one in tried
    ]
    return planner.plan(tried[0][1], [], splits)


def _model_ranks(parallel: ParallelConfig) -> int:
    return parallel.tensor * parallel.pipeline * parallel.context


def _size_problems(config: RunConfig, cluster: ClusterSize) -> list[str]:
    problems = []
    if config.parallel.world_size != cluster.trainer_gpus:
        data, rest = divmod(cluster.trainer_gpus, _model_ranks(config.parallel))
        remedy = f"set parallel.data = {data}" if data and not rest else "change the mesh or the number of GPUs"
        problems.append(
            f"parallel: tensor x pipeline x context x data = {config.parallel.world_size} ranks must be as many as the "
            f"trainer's GPUs = {cluster.trainer_gpus}: {remedy}"
        )
    served = config.server.count * config.server.tensor_parallel
    if not config.server.urls and served != cluster.server_gpus:
        count, rest = divmod(cluster.server_gpus, config.server.tensor_parallel)
        remedy = f"set server.count = {count}" if count and not rest else "change server.tensor_parallel"
        problems.append(
            f"server.count x tensor_parallel = {served} must be as many as the servers' GPUs = "
            f"{cluster.server_gpus}: {remedy}"
        )
    return problems


def _splits(config: RunConfig, cluster: ClusterSize) -> Iterator[RunConfig]:
    """The settings with every split of `total_gpus` that mesh and servers allow."""
    total, tensor = cluster.total_gpus, config.server.tensor_parallel
    unit = cluster.node_size if total >= 2 * cluster.node_size else 1
    for trainer in range(unit, total, unit):
        data, rest = divmod(trainer, _model_ranks(config.parallel))
        servers, left = divmod(total - trainer, tensor)
        sequences = config.batch.mini_batch_prompts * config.batch.responses_per_prompt
        experts = config.parallel.expert * config.parallel.expert_tensor
        dense = config.parallel.tensor * config.parallel.context * data
        if not data or rest or left or not servers or dense % experts or data > sequences:
            continue
        yield config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update={"data": data}),
                "server": config.server.model_copy(update={"count": servers}),
            }
        )


@dataclass(frozen=True)
class _Planner:
    architecture: Architecture
    cluster: ClusterSize
    workload: Workload
    calibration: Calibration

    def plan(self, config: RunConfig, problems: list[str], splits: list[SplitTime]) -> Plan:
        gpu, node = self.cluster.kind, self.cluster.node_size
        batch = batch_of(config, self.workload)
        cost = self._trainer(config).step(batch)
        server = self._server(config)
        first, last = _steady(config)
        timeline = self._simulate(config, cost, server, last)
        ranks = self.ranks(config)
        host = host_memory(config, self.architecture, min(node, config.parallel.world_size), batch.tokens)
        problems = [*problems, *self._memory_problems(config, ranks), *self._server_problems(config, server.memory)]
        if host.total > gpu.host_memory_bytes:
            problems.append(_host_problem(config, host, gpu))
        steady = timeline.batch_s[first:last]
        return Plan(
            config=config,
            architecture=self.architecture,
            cluster=self.cluster,
            workload=self.workload,
            problems=problems,
            ranks=ranks,
            server=server.memory,
            host=host,
            cost=cost,
            max_running=server.max_running,
            generation_s=sum(steady) / len(steady),
            step_s=timeline.step_s(first, last),
            wait_share=timeline.wait_share(first, last),
            idle_share=timeline.idle_share(first, last),
            timeline=timeline,
            splits=splits,
        )

    def step_s(self, config: RunConfig) -> float:
        """Infinite where trainer or servers do not fit."""
        server = self._server(config)
        if self._memory_problems(config, self.ranks(config), remedies=False) or server.memory.kv_tokens == 0:
            return math.inf
        cost = self._trainer(config).step(batch_of(config, self.workload))
        first, _ = _steady(config)
        return self._simulate(config, cost, server, first + SEARCH_STEPS).step_s(first, first + SEARCH_STEPS)

    def ranks(self, config: RunConfig) -> list[RankMemory]:
        longest = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
        row = Row(config.batch.max_tokens_per_row, min(longest, config.batch.max_tokens_per_row))
        sequences = config.batch.mini_batch_prompts * config.batch.responses_per_prompt
        # however short they are, an update has at most a row a sequence
        micro_batches = -(-sequences // config.parallel.data_size)
        return [
            rank_memory(config, self.architecture, row, micro_batches, stage, EXPERT_IMBALANCE)
            for stage in range(config.parallel.pipeline)
        ]

    def _trainer(self, config: RunConfig) -> TrainerCost:
        return TrainerCost(config, self.architecture, self.cluster.kind, self.cluster.node_size, self.calibration)

    def _server(self, config: RunConfig) -> DecodingServer:
        memory = server_memory(config, self.architecture, self.cluster.kind)
        context = self.workload.mean_prompt_tokens + self.workload.mean_response_tokens / 2
        return DecodingServer(
            config, self.architecture, self.cluster.kind, memory, self.calibration, config.server.count, context
        )

    def _simulate(self, config: RunConfig, cost: StepCost, server: DecodingServer, num_steps: int) -> Timeline:
        phases = Phases(cost.score, cost.train, cost.publish, cost.checkpoint, config.checkpoint.every_steps)
        lengths = GroupLengths(config, self.workload)
        return Simulation(config, phases, server, lengths).run(num_steps)

    def _memory_problems(self, config: RunConfig, ranks: list[RankMemory], remedies: bool = True) -> list[str]:
        limit = self.cluster.kind.memory_bytes
        worst = max(ranks, key=lambda rank: rank.total)
        if worst.total <= limit:
            return []
        found = list(self._fitting_changes(config)) if remedies else []
        remedy = " or ".join(found[:3]) if found else "take more GPUs for the trainer and cut the model further"
        return [
            f"memory of a trainer rank of stage {worst.stage} = {worst.total / 1e9:.1f} GB (states "
            f"{worst.states / 1e9:.1f}, activations {worst.activations.peak / 1e9:.1f}) must be at most the "
            f"{limit / 1e9:.1f} GB of {self.cluster.gpu}: set {remedy}"
        ]

    def _fitting_changes(self, config: RunConfig) -> Iterator[str]:
        """Settings with which the ranks fit, the cheapest first."""
        for names, changed in _changes(config):
            try:
                refuse_uneven_cuts(self.architecture, changed.parallel)
            except ValueError:
                continue
            if max(rank.total for rank in self.ranks(changed)) <= self.cluster.kind.memory_bytes:
                yield names

    def _server_problems(self, config: RunConfig, memory: ServerMemory) -> list[str]:
        longest = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
        if config.server.urls or memory.kv_tokens >= longest:
            return []
        return [
            f"server: the KV cache of {memory.kv_tokens:,} tokens beside {memory.weights / 1e9:.1f} GB of weights must "
            f"hold sampling.max_prompt_tokens + max_response_tokens = {longest:,}: raise server.tensor_parallel = "
            f"{config.server.tensor_parallel}"
            + (" or server.max_total_tokens" if config.server.max_total_tokens else "")
        ]


def _steady(config: RunConfig) -> tuple[int, int]:
    """The steps (first, beyond the last) that count as mid-run."""
    settings = config.staleness
    first = (settings.delay_steps if settings.mode == "delay" else settings.max_staleness + 1) + 1
    return first, first + STEADY_STEPS


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Single changes that save memory on as many GPUs, then the same with full recomputation."""
    model, parallel, batch = config.model, config.parallel, config.batch
    for recompute in ("selective", "full"):
        if recompute != model.recompute and model.recompute != "full":
            yield f"model.recompute = {recompute}", _with(config, model={"recompute": recompute})
    longest = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
    if batch.max_tokens_per_row // 2 >= longest:
        row = batch.max_tokens_per_row // 2
        yield f"batch.max_tokens_per_row = {row}", _with(config, batch={"max_tokens_per_row": row})
    for base in (config, _with(config, model={"recompute": "full"})):
        suffix = "" if base is config else " with model.recompute = full"
        if base is not config and model.recompute == "full":
            return
        for axis in ("expert", "context", "tensor", "pipeline"):
            changed = _doubled(parallel, axis)
            if changed is not None:
                name = f"parallel.{axis} = {getattr(changed, axis)}{suffix}"
                yield name, base.model_copy(update={"parallel": changed})
        if config.device == "cuda" and model.dtype == "bfloat16" and config.optimizer.cpu_offload < 1:
            yield f"optimizer.cpu_offload = 1{suffix}", _with(base, optimizer={"cpu_offload": 1.0})


def _with(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=change) for name, change in sections.items()}
    )


def _doubled(parallel: ParallelConfig, axis: str) -> ParallelConfig | None:
    """Twice the degree on as many ranks; None where the axes do not allow it."""
    values = parallel.model_dump() | {axis: 2 * getattr(parallel, axis), "data": parallel.data_size}
    if axis == "pipeline":
        values["pipeline_layers"] = ()
    if axis != "expert":
        if parallel.data_size % 2:
            return None
        values["data"] = parallel.data_size // 2
    try:
        return ParallelConfig.model_validate(values)
    except ValueError:
        return None


def _host_problem(config: RunConfig, host: HostMemory, gpu: GpuKind) -> str:
    parts = {
        f"staleness ({host.snapshots / 1e9:.0f} GB of weight snapshots)": host.snapshots,
        f"checkpoint.asynchronous = false ({host.checkpoint / 1e9:.0f} GB)": host.checkpoint,
        f"a lower optimizer.cpu_offload ({host.offloaded / 1e9:.0f} GB)": host.offloaded,
        f"model.routing_replay = none ({host.routes / 1e9:.0f} GB)": host.routes,
    }
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"host memory of a node with {host.ranks} trainer ranks = {host.total / 1e9:.0f} GB must be at most the "
        f"{gpu.host_memory_bytes / 1e9:.0f} GB of a node of {gpu.name}: the largest part falls with {largest}"
    )
