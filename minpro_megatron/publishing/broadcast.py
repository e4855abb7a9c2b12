"""Rank 0's broadcasts to the servers, over one process group that is kept for later publications."""

import socket
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
from torch import Tensor

from minpro_megatron.parallel.device import process_group_backend
from minpro_megatron.publishing.sender import BucketMemory
from minpro_megatron.publishing.update_group import UpdateGroup
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.addresses import is_loopback
from minpro_megatron.serving.calls import PendingCalls, ServersFailed, in_thread, start_for_all
from minpro_megatron.serving.control import ServerControl
from minpro_megatron.weights.hf_files import dtype_name

# Time limit for the servers to notice that the group was closed, and to answer the request to leave it.
GRACE_S = 10.0


@dataclass(frozen=True)
class _Sending:
    """A bucket that is being sent."""

    flat: Tensor  # kept until all servers have it
    receiving: PendingCalls
    sent: Future[object]


class Broadcaster:
    """Sends buckets to a set of servers. Only rank 0 has one. A failure at any server closes the group for all."""

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self._backend = process_group_backend(device)
        self._timeout_s = timeout_s
        self._controls: dict[int, ServerControl] = {}
        self._members: frozenset[ServerAddress] = frozenset()
        self._group: UpdateGroup | None = None
        self._sending: _Sending | None = None
        # kept until all buckets are sent: the kernel would zero new memory page by page
        self._memory = bucket_memory()

    def connect(self, controls: Mapping[int, ServerControl]) -> None:
        """Makes the group of rank 0 and these servers if it does not exist. Raises ServersFailed."""
        members = frozenset(control.address for control in controls.values())
        if self._group is not None and members == self._members:
            self._controls = dict(controls)
            return
        self.close()
        self._controls, self._members = dict(controls), members
        offsets, world_size = [], 1
        for control in controls.values():
            offsets.append({"rank_offset": world_size})
            world_size += control.address.tensor_parallel
        self._group = UpdateGroup(
            address=own_address(members),
            world_size=world_size,
            name=f"minpro-{uuid.uuid4().hex[:12]}",  # unique: a server may still have a group of a dead trainer
            backend=self._backend,
            timeout_s=self._timeout_s,
        )
        joining = start_for_all(controls.values(), "init_weights_update_group", per_server=offsets, **self._group.where)
        self._finish(joining, in_thread(self._group.join))

    def send(self, bucket: Sequence[tuple[str, Tensor]], weight_version: int | str) -> None:
        """Starts to send the tensors once the previous bucket has arrived; meanwhile the caller may gather the next.
        Raises ServersFailed for either bucket.

        On a GPU torch runs the broadcast on the current stream of its thread, which is the default stream. What the
        caller gathers next is queued behind it there: only the servers' loading overlaps with gathering."""
        flat = self._memory.fill([tensor for _, tensor in bucket])
        self._wait()
        assert self._group is not None, "connect comes first"
        receiving = start_for_all(
            self._controls.values(),
            "update_weights_from_distributed",
            names=[name for name, _ in bucket],
            dtypes=[dtype_name(tensor.dtype) for _, tensor in bucket],
            shapes=[list(tensor.shape) for _, tensor in bucket],
            group_name=self._group.where["group_name"],
            weight_version=weight_version,
            load_format="flattened_bucket",
        )
        self._sending = _Sending(flat, receiving, in_thread(self._group.broadcast, flat))

    def finish(self) -> None:
        """Waits until every server has loaded what was sent. Raises ServersFailed."""
        self._wait()
        self._memory.clear()

    def _wait(self) -> None:
        if self._sending is not None:
            sending, self._sending = self._sending, None
            self._finish(sending.receiving, sending.sent)

    def close(self) -> None:
        """Closes the group, also at the servers that still answer."""
        if self._group is None:
            return
        group, self._group = self._group, None
        self._sending = None
        self._memory.clear()
        group.close()
        controls = [control.within(GRACE_S) for control in self._controls.values()]
        farewell = start_for_all(controls, "destroy_weights_update_group", group_name=group.where["group_name"])
        farewell.results()  # errors are ignored: the group is not needed any more

    def _finish(self, calls: PendingCalls, own: Future) -> None:
        """Waits for the servers' answers and for this process's own part. The first failure closes the group: the other
        servers would wait for the failed one, with gloo for half an hour."""
        everything = [*calls.futures, own]
        done, _ = wait(everything, return_when=FIRST_EXCEPTION)
        if all(future.exception() is None for future in done):
            return
        culprits = calls.failures()
        if self._group is not None:
            self._group.close()
        wait(everything, timeout=GRACE_S)
        failures = calls.failures()
        failures |= {
            index: f"{self._name(index)}: no answer {GRACE_S:g} s after the group was closed"
            for index in calls.unfinished()
        }
        if not failures:  # every server reports success although rank 0 failed to send
            failures = {index: f"{self._name(index)}: {own.exception()}" for index in self._controls}
        self.close()
        raise ServersFailed(failures | culprits)

    def _name(self, index: int) -> str:
        address = self._controls[index].address
        return f"server {index} at {address.url}"


def bucket_memory() -> BucketMemory:
    """Buffers on the device of the tensors that fill them."""
    return BucketMemory(lambda num_bytes, device: torch.empty(num_bytes, dtype=torch.uint8, device=device))


def own_address(servers: Iterable[ServerAddress]) -> str:
    """An address of this machine that the servers can reach: loopback if all servers are on this machine, else the
    address from which this machine reaches them."""
    hosts = [urlsplit(server.url) for server in servers]
    others = [host for host in hosts if not is_loopback(host.hostname or "")]
    if not others:
        return "127.0.0.1"
    family, kind, _, _, where = socket.getaddrinfo(others[0].hostname, others[0].port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting a datagram socket sends nothing
        probe.connect(where)
        return probe.getsockname()[0]
