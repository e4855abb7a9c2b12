"""The mesh of one rank, with process groups that send nothing."""

from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.parallel import mesh as mesh_module
from minpro_megatron.parallel.mesh import Mesh, build_mesh


def open_fake_mesh(
    config: ParallelConfig, device: torch.device, seed: int, rank: int, backends: dict[str, str]
) -> Mesh:
    """The mesh as rank `rank` sees it. All other ranks answer what this rank answers. `backends` is filled with the
    backend of each group that the code asks for by name, once it does."""
    new_group = dist.new_group

    def new_fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        group = new_group(ranks, backend="fake", group_desc=kwargs.get("group_desc"))
        name = getattr(group, "group_name", None)
        if name:  # this rank is in it
            backends[name] = backend or "nccl"
        return group

    def gather_objects(found: list, value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    distributed, kind = cast(Any, dist), cast(Any, mesh_module.Mesh)
    distributed.new_group, distributed.all_gather_object = new_fake_group, gather_objects
    kind.from_rank_0 = lambda self, value: value
    kind.from_all_ranks = lambda self, value: [value] * config.world_size
    dist.init_process_group("fake", rank=rank, world_size=config.world_size, store=FakeStore())
    return build_mesh(config, device, seed, timedelta(minutes=30))
