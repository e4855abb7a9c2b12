"""Publishing: the trainer's weights become a new policy version on every rollout server."""

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.parallel.device import process_group_backend
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.parallel.update_group import join_update_group
from minpro_megatron.records import PublishLease, ServerAddress
from minpro_megatron.serving.control import ServerControl, for_all, start_for_all
from minpro_megatron.weights.gather import WeightGatherer
from minpro_megatron.weights.hf_files import dtype_name

GROUP_NAME = "minpro_weights"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Publisher:
    """Broadcasts the model to the servers, a bucket at a time. All ranks take part; rank 0 talks to the servers."""

    def __init__(self, gatherer: WeightGatherer, mesh: Mesh, bucket_bytes: int) -> None:
        self._gatherer = gatherer
        self._mesh = mesh
        self._bucket_bytes = bucket_bytes
        self._controls: list[ServerControl] = []
        self._group: dist.ProcessGroup | None = None
        self._checksum = ""

    def publish(self, lease: PublishLease | None, changed: bool) -> None:
        """Collective: `lease` on rank 0, None elsewhere. Returns when every server holds the lease's version.
        `changed`: the weights must differ from those last published.

        Raises ControlError if a server refuses, RuntimeError if the servers do not end with one and the same new
        set of weights (SGLang accepts unknown tensor names without a word: only checksums tell).
        """
        buckets = self._gatherer.buckets(self._bucket_bytes)
        if self._mesh.rank != 0:
            for _ in buckets:
                pass
            return
        assert lease is not None, "rank 0 publishes under a lease"
        if self._group is None:
            self._connect(lease.servers)
        for_all(self._controls, "begin_weight_update")
        for bucket in buckets:
            self._broadcast(bucket, lease.version)
        for_all(self._controls, "end_weight_update")
        for_all(self._controls, "flush_cache")
        self._check(lease.version, changed)

    def _connect(self, servers: Sequence[ServerAddress]) -> None:
        self._controls = [ServerControl(server) for server in servers]
        self._checksum = self._common_checksum()
        offsets, world_size = [], 1
        for server in servers:
            offsets.append({"rank_offset": world_size})
            world_size += server.tensor_parallel
        where = {
            "master_address": _own_address(servers),
            "master_port": _free_port(),
            "world_size": world_size,
            "group_name": GROUP_NAME,
            "backend": process_group_backend(self._mesh.device),
        }
        joining = start_for_all(self._controls, "init_weights_update_group", per_server=offsets, **where)
        self._group = join_update_group(**where)
        joining.wait()

    def _broadcast(self, bucket: Sequence[tuple[str, Tensor]], version: int) -> None:
        flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
        receiving = start_for_all(
            self._controls,
            "update_weights_from_distributed",
            names=[name for name, _ in bucket],
            dtypes=[dtype_name(tensor.dtype) for _, tensor in bucket],
            shapes=[list(tensor.shape) for _, tensor in bucket],
            group_name=GROUP_NAME,
            weight_version=version,
            load_format="flattened_bucket",
        )
        sending = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        receiving.wait()  # first: a server that refused would leave the broadcast waiting for it
        assert sending is not None
        sending.wait()

    def _check(self, version: int, changed: bool) -> None:
        checksum = self._common_checksum()
        if changed and checksum == self._checksum:
            raise RuntimeError(
                f"publishing version {version} changed no weight on the servers (checksum {checksum}): "
                "do the tensor names fit the server's model?"
            )
        self._checksum = checksum

    def _common_checksum(self) -> str:
        checksums = [found.engine for found in for_all(self._controls, "weights_checksum")]
        if len(set(checksums)) != 1:
            raise RuntimeError(f"the servers hold different weights: checksums {', '.join(checksums)}")
        return checksums[0]


def _own_address(servers: Sequence[ServerAddress]) -> str:
    """An address of this machine that the servers can reach: loopback if they all are on it."""
    if all(urlsplit(server.url).hostname in LOOPBACK for server in servers):
        return "127.0.0.1"
    return socket.gethostbyname(socket.gethostname())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
