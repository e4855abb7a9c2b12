"""The mesh of trainer ranks: Megatron-Core's process groups by axis.

Only this file reads Megatron's global `parallel_state`; everything else takes a Mesh or a group.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.errors import UserError
from minpro_megatron.parallel.device import process_group_backend, select_device
from minpro_megatron.parallel.flat_objects import flattened, unflattened
from minpro_megatron.parallel.numa import bind_beside

# The watchdog of each rank (monitor/watchdog.py) detects a real hang.
MAX_WAIT = timedelta(days=30)
# The time limits of NCCL and gloo are longer than the watchdog's: it reports what each rank is doing, while they end
# the process without a report on the other ranks. The minimum limits what no watchdog guards, such as loading a model.
MIN_GROUP_TIMEOUT_S = 1800.0
WATCHDOG_MARGIN_S = 120.0


@dataclass(frozen=True)
class Mesh:
    """This rank's process groups. A group knows its size and this rank's index in it: `mesh.tensor.size()`."""

    config: ParallelConfig
    device: torch.device
    groups: ProcessGroupCollection
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    tensor_and_context: dist.ProcessGroup
    stage: dist.ProcessGroup  # the tensor x context x data ranks of this rank's pipeline stage
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_tensor: dist.ProcessGroup
    control: dist.ProcessGroup  # all ranks over gloo, for Python objects

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def is_first_pipeline_stage(self) -> bool:
        return self.pipeline.rank() == 0

    @property
    def is_last_pipeline_stage(self) -> bool:
        return self.pipeline.rank() == self.pipeline.size() - 1

    def from_rank_0[T](self, value: T | None) -> T:
        """Rank 0's `value` on every rank. On the other ranks its arrays share one block of memory."""
        first = self.rank == 0
        flat = torch.from_numpy(flattened(value)) if first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(flat)])
        dist.broadcast(size, src=0, group=self.control)
        if not first:
            flat = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(flat, src=0, group=self.control)
        return cast(T, value if first else unflattened(flat.numpy()))

    def from_all_ranks[T](self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank."""
        gathered: list[T | None] = [None] * self.control.size()
        dist.all_gather_object(gathered, value, group=self.control)
        return cast(list[T], gathered)


@contextmanager
def open_mesh(
    config: ParallelConfig,
    device_name: str,
    seed: int,
    init_method: str = "env://",
    hang_timeout_s: float = 0.0,
    rank: int = -1,
    world_size: int = -1,
) -> Iterator[Mesh]:
    """Context manager: initializes the process group and the mesh, and destroys both at the end.

    `rank` and `world_size` are needed if the environment does not set them. `seed` sets Megatron's random state.
    The time limit of every group is longer than `hang_timeout_s`, that of the run's watchdogs (debug.hang_timeout_s).
    Raises ValueError if the number of processes is not `config.world_size`.
    """
    device = select_device(device_name)
    if device.type == "cuda" and config.numa_binding:
        bind_beside(device)  # before it allocates host memory
    timeout = _group_timeout(hang_timeout_s)
    dist.init_process_group(
        process_group_backend(device),
        init_method=init_method,
        timeout=timeout,
        rank=rank,
        world_size=world_size,
    )
    try:
        if dist.get_world_size() != config.world_size:
            raise UserError(
                f"parallel: tensor x pipeline x context x data = {config.world_size} ranks are needed, "
                f"{dist.get_world_size()} were started"
            )
        yield build_mesh(config, device, seed, timeout)
    except BaseException:
        _leave(aborted=device.type == "cuda")
        raise
    _leave()


def _leave(aborted: bool = False) -> None:
    """`aborted`: without waiting for the other ranks. Destroying an NCCL group is collective: a rank that fails alone
    would wait for ranks that wait for it."""
    parallel_state.destroy_model_parallel()
    if aborted:
        distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _group_timeout(hang_timeout_s: float) -> timedelta:
    """The time limit of groups in whole minutes, as Megatron requires."""
    return timedelta(minutes=math.ceil(max(MIN_GROUP_TIMEOUT_S, hang_timeout_s + WATCHDOG_MARGIN_S) / 60))


def build_mesh(config: ParallelConfig, device: torch.device, seed: int, timeout: timedelta) -> Mesh:
    """The mesh of this process's default process group, which exists. Collective."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        distributed_timeout_minutes=round(timeout.total_seconds() / 60),
    )
    # megatron-core 0.19.2 makes one group without the time limit: the experts' data-parallel group over gloo
    for group in list(distributed_c10d._world.pg_map):
        dist.set_timeout(timeout, group)
    model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Mesh(
        config=config,
        device=device,
        groups=groups,
        tensor=groups.tp,
        context=groups.cp,
        tensor_and_context=groups.tp_cp,
        stage=groups.tp_dp_cp,
        pipeline=groups.pp,
        data=groups.dp,
        expert=groups.ep,
        expert_tensor=groups.expt_tp,
        # in this group the other ranks wait while rank 0 waits for rollouts, evaluations and servers
        control=cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=MAX_WAIT)),
    )
