"""What sends buckets of weights to the servers of a lease: its interface, and the memory that holds two buckets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from minpro_megatron.serving.control import ControlError, ServerControl

Transport = Literal["broadcast", "shared_memory", "disk"]


class PublishError(ControlError):
    """New weights did not arrive at any server: the fault is in the trainer or its settings."""


class Sender(Protocol):
    """Sends buckets to a set of servers, on rank 0. After ServersFailed the transfer has failed for all servers: it is
    repeated from `connect`, with those that can continue."""

    def connect(self, controls: Mapping[int, ServerControl]) -> None:
        """The servers of the next transfer, by index. Raises ServersFailed."""
        ...

    def send(self, bucket: Sequence[tuple[str, Tensor]], weight_version: int | str) -> None:
        """Starts to send the tensors once the servers have loaded the previous bucket; meanwhile the caller may gather
        the next (on GPUs it waits for a broadcast: see Broadcaster.send). The tensors are copied before it returns.
        Raises ServersFailed for either bucket."""
        ...

    def finish(self) -> None:
        """Waits until every server has loaded what was sent. Raises ServersFailed."""
        ...

    def close(self) -> None:
        """Ends what exists between this process and the servers."""
        ...


class BucketMemory:
    """Two buffers: one is being sent while the other is being filled."""

    def __init__(self, allocate: Callable[[int, torch.device], Tensor]) -> None:
        """`allocate(num_bytes, device)` returns uint8 [num_bytes]; `device` is that of the tensors of the bucket."""
        self._allocate = allocate
        self._buffers: list[Tensor] = []

    def fill(self, tensors: Sequence[Tensor]) -> Tensor:
        """The concatenated bytes of the tensors, uint8, in the buffer that was not filled last."""
        sizes = [tensor.nbytes for tensor in tensors]
        memory = self._buffers.pop(0) if len(self._buffers) > 1 else None
        if memory is None or len(memory) < sum(sizes):
            memory = None  # released before the larger one is allocated
            memory = self._allocate(sum(sizes), tensors[0].device)
        self._buffers.append(memory)
        flat = memory[: sum(sizes)]
        for place, tensor in zip(flat.split(sizes), tensors, strict=True):
            place.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        return flat

    def clear(self) -> None:
        self._buffers.clear()
