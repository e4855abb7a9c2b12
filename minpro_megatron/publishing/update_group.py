"""The process group over which rank 0 broadcasts new weights to the rollout servers.

Its members are this process (rank 0) and other programs' processes, which may die or hang at any moment. torch's own
groups wait for such a member for half an hour; these can be closed at once, for all their members.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

_UNUSED_TAG = 0x6D70
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read once, when a group is made


class UpdateGroup:
    """Rank 0's end of a group of `world_size`. Made first; then the others are told `where`, while this one joins."""

    def __init__(self, *, address: str, world_size: int, name: str, backend: str, timeout_s: float) -> None:
        """`address` is one of this machine's that the others can reach."""
        self._timeout = timedelta(seconds=timeout_s)
        # A store of its own beside the one it joins through: only so can it be ended under those who wait in it.
        # It listens on `address` alone; torch's own listener would be on all interfaces.
        listener = _listener(address)
        self._store: TCPStore | None = TCPStore(
            address,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=self._timeout,
            master_listen_fd=listener.detach(),
        )
        self.where: dict[str, Any] = {
            "master_address": address,
            "master_port": self._store.port,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        self._group: dist.ProcessGroup | None = None

    def join(self) -> None:
        """Returns when all members have come. Raises RuntimeError if the group is closed before that."""
        address, port = self.where["master_address"], self.where["master_port"]
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=self._timeout)
        fields = {name: self.where[name] for name in ("world_size", "group_name", "backend")}
        self._group = _join(store, 0, timeout=self._timeout, **fields)

    def broadcast(self, flat: Tensor) -> None:
        """Sends `flat` to all others, who must ask for as much. Returns when it is under way (NCCL) or gone (gloo);
        whether they all have it is theirs to say. Raises RuntimeError if a member has died or the group is closed, but
        may wait for a dead one until then: NCCL connects its members at the first broadcast."""
        assert self._group is not None, "the group has been joined"
        dist.broadcast(flat, src=0, group=self._group)

    def close(self) -> None:
        """Leaves the group; whoever waits in it, here or elsewhere, fails at once."""
        self._store = None
        if self._group is None:
            return
        if self.where["backend"] == "gloo":
            _end_connections(self._group)
        distributed_c10d._abort_process_group(self._group)
        self._group = None


def _listener(address: str) -> socket.socket:
    """A socket that listens on `address` at a free port. Raises OSError."""
    family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    return socket.create_server(where[:2], family=family)


def _end_connections(group: dist.ProcessGroup) -> None:
    """gloo has nothing to abort with (torch's abort does nothing for it), but an operation that exceeds its time limit
    ends all connections of its group, and everything that waits for one of them."""
    for peer in range(1, group.size()):
        with suppress(RuntimeError):
            group.recv([torch.empty(1)], peer, _UNUSED_TAG).wait(timedelta(milliseconds=1))


def join_update_group(
    *,
    master_address: str,
    master_port: int,
    rank: int,
    world_size: int,
    group_name: str,
    backend: str,
    timeout_s: float = 300,
) -> dist.ProcessGroup:
    """Join the group of an UpdateGroup elsewhere, as SGLang's servers do on `/init_weights_update_group`: for a server
    of our own. Blocks until all members have come."""
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(
        rendezvous(f"tcp://{master_address}:{master_port}", rank, world_size=world_size, timeout=timeout)
    )
    store.set_timeout(timeout)
    return _join(store, rank, world_size=world_size, group_name=group_name, backend=backend, timeout=timeout)


@contextmanager
def _failures_are_handled_here() -> Iterator[None]:
    """An NCCL group that is made within does not end this process when a member dies or takes too long, as torch has it
    by default and torchrun asks for: the group is closed, and made anew with the others."""
    before = os.environ.get(_ERROR_HANDLING)
    os.environ[_ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ERROR_HANDLING]
        else:
            os.environ[_ERROR_HANDLING] = before


def _join(
    store: Store, rank: int, *, world_size: int, group_name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """The group lies beside this process's default group, with members outside it, which no public function of torch
    makes. Store prefix and group name must be those of SGLang 0.5.23 (`init_custom_process_group` in
    sglang/srt/utils/common.py), or the members wait for each other under different keys.
    """
    with _failures_are_handled_here():
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
