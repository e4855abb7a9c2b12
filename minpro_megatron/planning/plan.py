"""Predicts whether a run fits on a cluster and how long a step takes, before the start and without torch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture, refuse_uneven_cuts
from minpro_megatron.models.known_models.find import find_architecture
from minpro_megatron.planning.cluster_size import ClusterSize, in_turns, model_ranks, size_problems
from minpro_megatron.planning.cluster_size import splits as splits_of
from minpro_megatron.planning.cost_model import Calibration, DecodingServer, StepCost, TrainerCost
from minpro_megatron.planning.evaluations import EvaluationCost, evaluation_cost, evaluation_lengths
from minpro_megatron.planning.memory import HostMemory, RankMemory, ServerMemory, host_memory, server_memory
from minpro_megatron.planning.problems import (
    host_problems,
    largest_rank,
    rank_problems,
    request_problems,
    server_problems,
    stage_memories,
    turn_problems,
)
from minpro_megatron.planning.routes import route_file_bytes
from minpro_megatron.planning.simulated_server import Lengths
from minpro_megatron.planning.simulator import Phases, Simulation, Timeline
from minpro_megatron.planning.turns import TurnMemory, fitting_share, turn_memory
from minpro_megatron.planning.workload import GroupLengths, Workload, batch_of

STEADY_STEPS = 4  # number of steps over which shares and durations are averaged
SEARCH_STEPS = 2  # the same number for the comparison of splits
MAX_SPLITS = 8  # of which all are tried


@dataclass(frozen=True)
class SplitTime:
    """A split of the GPUs, and the duration of a step with it. `in_turns`: both have all of them, in turns."""

    trainer_gpus: int
    server_gpus: int
    step_s: float
    in_turns: bool = False


@dataclass(frozen=True)
class Plan:
    """The predicted memory and time of a run. Shares and durations are of steps in the middle of the run."""

    config: RunConfig  # with the planned mesh and number of servers
    architecture: Architecture
    cluster: ClusterSize
    workload: Workload
    problems: list[str]  # each names field, value, rule and remedy; empty: the run fits
    ranks: list[RankMemory]  # one per pipeline stage
    server: ServerMemory
    host: HostMemory
    turns: TurnMemory | None  # of GPUs that trainer and servers share; None: they have GPUs of their own
    route_file_bytes: int  # in the run folder, for model.routing_replay = rollout and sampling.top_k
    cost: StepCost
    steps_between_checkpoints: int  # 0: none before the run's end
    max_running: int  # concurrent responses on a server
    generation_s: float  # of a batch, from its first group's start to its last one's end
    step_s: float
    wait_share: float  # share of the trainer's time waiting for rollouts
    idle_share: float  # share of the servers' time without any group
    slot_share: float  # share of the servers' slots that a response uses
    evaluation: EvaluationCost
    timeline: Timeline
    splits: list[SplitTime]  # the splits that were tried, best first; empty if the split was given

    @property
    def num_servers(self) -> int:
        return self.config.server.count

    @property
    def mean_step_s(self) -> float:
        """Seconds per step on average over the run, with its evaluations and checkpoints."""
        first, last = _steady(self.config)
        saves = self.cost.checkpoint / self.steps_between_checkpoints if self.steps_between_checkpoints else 0.0
        saves -= self.timeline.phase_s("checkpoint", first, last) / (last - first)  # already in `step_s`
        return self.step_s + saves + self.evaluation.added_s * self.evaluation.times / self.config.num_global_steps

    @property
    def settings(self) -> list[str]:
        """The overrides on the run's command line for the mesh and the servers of this plan."""
        server = self.config.server
        found = [f"parallel.data={self.config.parallel.data_size}", f"server.count={self.num_servers}"]
        if server.takes_turns:
            found += ["server.placement=shared", f"publish.transport={self.config.publish.transport}"]
            found += [] if server.memory_fraction is None else [f"server.memory_fraction={server.memory_fraction:g}"]
        return found


def plan_run(
    config: RunConfig,
    cluster: ClusterSize,
    workload: Workload | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan of `config` on `cluster`, which lists the problems.

    Raises ValueError if no plan is possible: for a run without rollouts of its own, an unknown model or kind of GPU, a
    mesh that does not divide the model, or if the mesh allows no split."""
    if not config.samples_responses:
        name, value = ("data.demonstrations", config.data.demonstrations)
        if not value:
            name, value = "debug.journal", config.debug.journal
        raise UserError(
            f"{name} = {value}: only runs that sample responses can be planned, and this one has no servers and "
            "publishes nothing; plan a run without it"
        )
    architecture = find_architecture(config.model.hf_path)
    refuse_uneven_cuts(architecture, config.parallel)
    workload = workload or Workload.of(config)
    lengths = GroupLengths(config, workload)
    planner = _Planner(architecture, cluster, workload, calibration or Calibration(), lengths)
    if config.server.urls:  # external servers: their number is fixed
        config = config.model_copy(
            update={"server": config.server.model_copy(update={"count": len(config.server.urls)})}
        )
    if not cluster.total_gpus:
        return planner.plan(config, size_problems(config, cluster), [])
    tried = planner.tried(config)
    if not tried:
        raise UserError(
            f"gpus = {cluster.total_gpus}: no part of them can train: parallel.tensor x pipeline x context = "
            f"{model_ranks(config.parallel)} ranks, expert x expert_tensor = "
            f"{config.parallel.expert * config.parallel.expert_tensor}, and a server's server.tensor_parallel = "
            f"{config.server.tensor_parallel} do not go into it; give more GPUs, or lower these"
        )
    splits = [
        SplitTime(
            one.parallel.world_size,
            one.server.count * one.server.tensor_parallel,
            step_s,
            in_turns=one.server.takes_turns,
        )
        for step_s, one in tried
    ]
    return planner.plan(tried[0][1], [], splits)


def best_first[Split](splits: Sequence[Split], step_s: Callable[[Split], float]) -> list[tuple[float, Split]]:
    """(seconds per step, split) of the splits that were tried, best first. `splits` are in order of the trainer's size.

    All are tried if there are at most MAX_SPLITS. Of more, every k-th is tried first, and then the neighbors of the
    best one at half the distance, until this is 1: with more GPUs for it training gets faster, and generation slower,
    so the best split is between two of those that were tried.
    """
    found: dict[int, float] = {}
    stride = 1
    while len(splits) > MAX_SPLITS * stride:
        stride *= 2
    wanted: Iterable[int] = range(0, len(splits), stride)
    while True:
        for place in wanted:
            if 0 <= place < len(splits) and place not in found:
                found[place] = step_s(splits[place])
        if stride == 1 or not found:
            break
        best, stride = min(found, key=found.__getitem__), stride // 2
        wanted = (best - stride, best + stride)
    return [(found[place], splits[place]) for place in sorted(found, key=found.__getitem__)]


@dataclass(frozen=True)
class _Planner:
    architecture: Architecture
    cluster: ClusterSize
    workload: Workload
    calibration: Calibration
    lengths: GroupLengths  # of the run's groups, the same for all splits

    def plan(self, config: RunConfig, problems: list[str], splits: list[SplitTime]) -> Plan:
        gpu, node = self.cluster.kind, self.cluster.node_size
        batch = batch_of(config, self.workload)
        cost = self._trainer(config).step(batch)
        server = self._server(config)
        first, last = _steady(config)
        timeline = self._simulate(config, cost, server, last)
        evaluated = evaluation_lengths(config, self.workload)
        with_evaluation = self._simulate(config, cost, server, last, {first: evaluated})
        ranks = stage_memories(config, self.architecture)
        host = host_memory(config, self.architecture, min(node, config.parallel.world_size), batch.tokens)
        turns = turn_memory(config, gpu, ranks, server.memory) if config.server.takes_turns else None
        problems = [
            *problems,
            *(
                rank_problems(config, self.architecture, gpu, ranks)
                if turns is None
                else turn_problems(config, self.architecture, gpu, ranks, turns)
            ),
            *server_problems(config, server.memory),
            *request_problems(config, with_evaluation),
            *host_problems(host, gpu),
        ]
        steady, step_s = timeline.batch_s[first:last], timeline.step_s(first, last)
        return Plan(
            config=config,
            architecture=self.architecture,
            cluster=self.cluster,
            workload=self.workload,
            problems=problems,
            ranks=ranks,
            server=server.memory,
            host=host,
            turns=turns,
            route_file_bytes=route_file_bytes(config, self.architecture, batch.tokens),
            cost=cost,
            steps_between_checkpoints=_steps_between_checkpoints(config, step_s),
            max_running=server.max_running,
            generation_s=sum(steady) / len(steady),
            step_s=step_s,
            wait_share=timeline.wait_share(first, last),
            idle_share=timeline.idle_share(first, last),
            slot_share=timeline.slot_share(first, last),
            evaluation=evaluation_cost(config, evaluated, first, timeline, with_evaluation),
            timeline=timeline,
            splits=splits,
        )

    def tried(self, config: RunConfig) -> list[tuple[float, RunConfig]]:
        """(seconds per step, settings) of every split of the GPUs that was tried, best first: on GPUs of their own,
        unless the settings say that trainer and servers share them, and in turns on all of them."""
        found = []
        if not config.server.takes_turns:
            found = best_first(list(splits_of(config, self.cluster)), self.step_s)
        if (shared := in_turns(config, self.cluster)) is not None:
            if not config.server.takes_turns or config.server.memory_fraction is None:
                share = fitting_share(shared, self.cluster.kind, stage_memories(shared, self.architecture))
                server = shared.server.model_copy(update={"memory_fraction": share})
                shared = shared.model_copy(update={"server": server}) if share > 0 else shared
            found.append((self.step_s(shared), shared))
        return sorted(found, key=lambda one: one[0])

    def step_s(self, config: RunConfig) -> float:
        """Seconds per step; infinite if trainer or servers do not fit."""
        server, gpu = self._server(config), self.cluster.kind
        ranks = stage_memories(config, self.architecture)
        needed = largest_rank(ranks).total
        if config.server.takes_turns:
            needed = turn_memory(config, gpu, ranks, server.memory).largest
        if needed > gpu.memory_bytes or server.memory.kv_tokens == 0:
            return math.inf
        cost = self._trainer(config).step(batch_of(config, self.workload))
        first, _ = _steady(config)
        return self._simulate(config, cost, server, first + SEARCH_STEPS).step_s(first, first + SEARCH_STEPS)

    def _trainer(self, config: RunConfig) -> TrainerCost:
        return TrainerCost(config, self.architecture, self.cluster.kind, self.cluster.node_size, self.calibration)

    def _server(self, config: RunConfig) -> DecodingServer:
        memory = server_memory(config, self.architecture, self.cluster.kind)
        context = self.workload.mean_prompt_tokens + self.workload.mean_response_tokens / 2
        return DecodingServer(
            config, self.architecture, self.cluster.kind, memory, self.calibration, config.server.count, context
        )

    def _simulate(
        self,
        config: RunConfig,
        cost: StepCost,
        server: DecodingServer,
        num_steps: int,
        evaluations: Mapping[int, Sequence[Lengths]] | None = None,
    ) -> Timeline:
        # the length of a step is not known before the simulation: this is the trainer's work in it
        every = _steps_between_checkpoints(config, cost.score + cost.train + cost.publish)
        phases = Phases(
            score=cost.score,
            train=cost.train,
            publish=cost.publish,
            pause=cost.pause,
            release=cost.release,
            checkpoint=cost.checkpoint,
            checkpoint_every=every,
        )
        return Simulation(config, phases, server, self.lengths, evaluations).run(num_steps)


def _steps_between_checkpoints(config: RunConfig, step_s: float) -> int:
    """The number if a step takes `step_s` seconds; 0: no checkpoint is saved before the run's end."""
    settings = config.checkpoint
    by_time = math.ceil(60 * settings.every_minutes / step_s)
    return min((every for every in (settings.every_steps, by_time) if every), default=0)


def _steady(config: RunConfig) -> tuple[int, int]:
    """The steps (first, last + 1) in the middle of the run."""
    settings = config.staleness
    first = (settings.delay_steps if settings.mode == "delay" else settings.max_staleness + 1) + 1
    return first, first + STEADY_STEPS
