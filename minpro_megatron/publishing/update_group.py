"""The process group over which rank 0 broadcasts new weights to the rollout servers.

Its members are this process (rank 0) and processes of other programs, which may die or hang at any moment. Torch's own
groups wait half an hour for such a member; an UpdateGroup can be closed at any time. See `UpdateGroup.close` for what
waits all the same with NCCL.
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
    """Rank 0's side of a group of `world_size` members. It is made first; then `where` is sent to the other members
    while this process joins."""

    def __init__(self, *, address: str, world_size: int, name: str, backend: str, timeout_s: float) -> None:
        """`address` is an address of this machine that the other members can reach."""
        self._timeout = timedelta(seconds=timeout_s)
        # A second store besides the one that it joins through: only then can it be closed while members wait in it.
        # It listens only on `address`; torch's own listener would listen on all interfaces.
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
        # Connected here and not in `join`: after `close` a connection attempt would be repeated until the time limit.
        self._joining_store = TCPStore(
            address, self._store.port, is_master=False, wait_for_workers=False, timeout=self._timeout
        )
        self._group: dist.ProcessGroup | None = None

    def join(self) -> None:
        """Waits until all members have joined. Raises RuntimeError if the group is closed before that, also if it is
        closed before this call."""
        fields = {name: self.where[name] for name in ("world_size", "group_name", "backend")}
        self._group = _join(self._joining_store, 0, timeout=self._timeout, **fields)

    def broadcast(self, flat: Tensor) -> None:
        """Sends `flat` to all other members, which must receive a tensor of the same size. Returns when the broadcast
        is started (NCCL) or sent (gloo); only the members know whether they have received it. Raises RuntimeError if a
        member has died or the group is closed, but may wait for a dead member until it is closed, or longer: NCCL
        connects its members at the first broadcast (see `close`)."""
        assert self._group is not None, "the group has been joined"
        dist.broadcast(flat, src=0, group=self._group)

    def close(self) -> None:
        """Closes the group, at once. Calls that wait in it fail, also in the other members, with one exception: a first
        NCCL broadcast whose members still connect. Torch knows a communicator only when all have connected, so there is
        none to abort. The call keeps its thread and its tensor until the connection fails, for ever if a member never
        connects; a server in that state is restarted.

        NCCL's mode without blocking (`config.blocking = 0`) does not help: torch 2.14 then waits for the connection
        with the lock that its abort takes, for TORCH_NCCL_NONBLOCKING_TIMEOUT seconds (half an hour by default; read
        once per process), so closing would wait as well.
        """
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
    """Aborts a gloo group. Torch's abort does nothing for gloo, but an operation that exceeds its time limit ends all
    connections of its group, and every operation that waits for one of them."""
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
    """Join the group of an UpdateGroup of another process, as SGLang's servers do on `/init_weights_update_group`; used
    by the reference engine. Blocks until all members have joined."""
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(
        rendezvous(f"tcp://{master_address}:{master_port}", rank, world_size=world_size, timeout=timeout)
    )
    store.set_timeout(timeout)
    return _join(store, rank, world_size=world_size, group_name=group_name, backend=backend, timeout=timeout)


@contextmanager
def _failures_are_handled_here() -> Iterator[None]:
    """Context manager: an NCCL group that is made inside does not end this process when a member dies or exceeds the
    time limit, which is torch's default and torchrun's setting. The group is closed, and a new one is made."""
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
    """Makes a group in addition to this process's default group, with members outside it; torch has no public function
    for this. Store prefix and group name must be those of SGLang 0.5.23 (`init_custom_process_group` in
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
