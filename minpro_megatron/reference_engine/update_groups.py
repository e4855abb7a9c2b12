"""Receives weights over process groups: the server's side of publishing/update_group.py. All calls block."""

import math
import threading
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.publishing.update_group import join_update_group

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UpdateRefused(Exception):
    """The request cannot be executed; the message is sent as the answer."""


class UpdateGroups:
    """The groups of this process, by name. A lock orders the threads: a group must not be destroyed while it
    receives."""

    def __init__(self) -> None:
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._turn = threading.Lock()

    def join(
        self, *, master_address: str, master_port: int, rank: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Waits until all `world_size` members have joined."""
        with self._turn:
            self._join(master_address, master_port, rank, world_size, group_name, backend)

    def _join(
        self, master_address: str, master_port: int, rank: int, world_size: int, group_name: str, backend: str
    ) -> None:
        if backend != "gloo":
            raise UpdateRefused(f"backend = {backend!r}: a server on the CPU receives weights only over gloo")
        if group_name in self._groups:
            raise UpdateRefused(f"Group {group_name} already exists. Please call `destroy_weights_update_group` first.")
        self._groups[group_name] = join_update_group(
            master_address=master_address,
            master_port=master_port,
            rank=rank,
            world_size=world_size,
            group_name=group_name,
            backend=backend,
        )

    def leave(self, group_name: str) -> None:
        with self._turn:
            group = self._groups.pop(group_name, None)
            if group is None:
                raise UpdateRefused("The group to be destroyed does not exist.")
            dist.destroy_process_group(group)

    def receive(
        self, group_name: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], flat: bool
    ) -> list[tuple[str, Tensor]]:
        """The named tensors from rank 0: one message per tensor, or all bytes in one message if `flat`."""
        with self._turn:
            return self._receive(group_name, names, dtypes, shapes, flat)

    def _receive(
        self, group_name: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], flat: bool
    ) -> list[tuple[str, Tensor]]:
        if group_name not in self._groups:
            raise UpdateRefused(
                f"Failed to receive weights: Group {group_name} not in {list(self._groups)}. "
                "Please call `init_weights_update_group` first."
            )
        unknown = sorted(set(dtypes) - DTYPES.keys())
        if unknown or not len(names) == len(dtypes) == len(shapes):
            raise UpdateRefused(
                f"Failed to receive weights: {len(names)} names, {len(dtypes)} dtypes (unknown: {unknown}), "
                f"{len(shapes)} shapes"
            )
        group = self._groups[group_name]
        kinds = [DTYPES[dtype] for dtype in dtypes]
        if flat:
            return list(zip(names, _receive_flat(group, kinds, shapes), strict=True))
        tensors = [torch.empty(*shape, dtype=kind) for kind, shape in zip(kinds, shapes, strict=True)]
        for tensor in tensors:
            dist.broadcast(tensor, src=0, group=group)
        return list(zip(names, tensors, strict=True))


def _receive_flat(
    group: dist.ProcessGroup, kinds: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]
) -> Iterator[Tensor]:
    sizes = [math.prod(shape) * kind.itemsize for kind, shape in zip(kinds, shapes, strict=True)]
    message = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(message, src=0, group=group)
    for part, kind, shape in zip(message.split(sizes), kinds, shapes, strict=True):
        yield part.clone().view(kind).view(*shape)  # copied, because a view of another dtype must be aligned to it
