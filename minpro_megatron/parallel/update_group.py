"""The process group over which rank 0 broadcasts new weights to the rollout servers."""

from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous


def join_update_group(
    *,
    master_address: str,
    master_port: int,
    world_size: int,
    group_name: str,
    backend: str,
    rank: int = 0,
    timeout_s: float = 300,
) -> dist.ProcessGroup:
    """Join the group that the servers join through `/init_weights_update_group`. Blocks until all members have.
    Rank 0 is the trainer's; the reference engine is a server itself and joins with a rank of its own.

    The group lies beside this process's default group, with members outside it, which no public function of torch
    makes. Store prefix and group name must be those of SGLang 0.5.23 (`init_custom_process_group` in
    sglang/srt/utils/common.py), or the members wait for each other under different keys.
    """
    timeout = timedelta(seconds=timeout_s)
    address = f"tcp://{master_address}:{master_port}"
    store, rank, world_size = next(rendezvous(address, rank, world_size=world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = distributed_c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        dist.Backend(backend),
        distributed_c10d.PrefixStore(group_name, store),
        group_name=distributed_c10d.GroupName(group_name),
        timeout=timeout,
    )
    distributed_c10d._world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return cast(dist.ProcessGroup, group)
