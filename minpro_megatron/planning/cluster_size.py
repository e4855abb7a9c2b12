"""The GPUs of a run: numbers for training and serving, and the possible splits of a total."""

from collections.abc import Iterator
from dataclasses import dataclass

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.planning.gpus import GpuKind, gpu_kind


@dataclass(frozen=True)
class ClusterSize:
    """The GPUs of a run. Either `trainer_gpus` and `server_gpus`, or `total_gpus`, for which the best split is
    searched (whole nodes for each side if there are several nodes)."""

    gpu: str = "h100-80gb"
    trainer_gpus: int = 0
    server_gpus: int = 0
    total_gpus: int = 0
    gpus_per_node: int = 0  # 0: the number of the usual node with this kind

    def __post_init__(self) -> None:
        given = self.trainer_gpus > 0 and self.server_gpus > 0
        if given == (self.total_gpus > 0) or min(vars(self)[name] for name in vars(self) if name != "gpu") < 0:
            raise UserError(
                f"cluster: trainer_gpus = {self.trainer_gpus}, server_gpus = {self.server_gpus}, total_gpus = "
                f"{self.total_gpus}: give the first two, or the last alone"
            )

    @property
    def kind(self) -> GpuKind:
        return gpu_kind(self.gpu)

    @property
    def node_size(self) -> int:
        return self.gpus_per_node or self.kind.gpus_per_node


def model_ranks(parallel: ParallelConfig) -> int:
    return parallel.tensor * parallel.pipeline * parallel.context


def size_problems(config: RunConfig, cluster: ClusterSize) -> list[str]:
    problems = []
    if config.parallel.world_size != cluster.trainer_gpus:
        data, rest = divmod(cluster.trainer_gpus, model_ranks(config.parallel))
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


def in_turns(config: RunConfig, cluster: ClusterSize) -> RunConfig | None:
    """The settings with which trainer and servers take turns on all of `total_gpus`, for the planner to add a share of
    memory for the servers; None if the mesh, the servers or other settings do not allow it."""
    total, tensor = cluster.total_gpus, config.server.tensor_parallel
    data, rest = divmod(total, model_ranks(config.parallel))
    if not data or rest or total % tensor or total > cluster.node_size:
        return None
    changes = [f"parallel.data={data}", f"server.count={total // tensor}", "server.placement=shared"]
    try:
        return with_overrides(config, [*changes, "publish.transport=shared_memory"])
    except UserError:  # bounded mode, too few sequences for the ranks, external servers
        return None


def splits(config: RunConfig, cluster: ClusterSize) -> Iterator[RunConfig]:
    """The settings for every split of `total_gpus` that mesh and servers allow."""
    total, tensor = cluster.total_gpus, config.server.tensor_parallel
    unit = cluster.node_size if total >= 2 * cluster.node_size else 1
    for trainer in range(unit, total, unit):
        data, rest = divmod(trainer, model_ranks(config.parallel))
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
