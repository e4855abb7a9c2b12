"""Rank 0 writes new weights into host memory that the servers of its machine read.

The tensors travel as SGLang's `update_weights_from_tensor` expects them: a message names the memory and states the
place of each tensor in it. Messages are pickled here and read by SGLang's unpickler, which accepts a list of names; the
request that carries them needs the run's API key. Trainer and servers need no process group and no common GPU.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch
import torch.multiprocessing
from torch import Tensor

from minpro_megatron.files.disk_space import SHARED_MEMORY, as_size, free_bytes
from minpro_megatron.publishing.sender import BucketMemory, PublishError
from minpro_megatron.serving.calls import PendingCalls, ServersFailed, start_for_all
from minpro_megatron.serving.control import ServerControl


@dataclass(frozen=True)
class _Loading:
    """A bucket that the servers are loading."""

    bucket: str  # for messages
    calls: PendingCalls


class SharedMemorySender:
    """Sends buckets to servers of this machine. Only rank 0 has one. Its two buffers are kept until the process ends,
    because torch counts the readers of shared memory, and a server that dies before it reads is counted for ever. Torch
    starts a process of its own (torch_shm_manager) that removes the memory after the end of this process, however it
    ends."""

    def __init__(self) -> None:
        self._controls: dict[int, ServerControl] = {}
        self._memory = BucketMemory(lambda num_bytes, _: shared_bytes(num_bytes))
        self._loading: _Loading | None = None
        self._count = 0  # of the buckets of this transfer

    def connect(self, controls: Mapping[int, ServerControl]) -> None:
        self._controls, self._count, self._loading = dict(controls), 0, None

    def send(self, bucket: Sequence[tuple[str, Tensor]], weight_version: int | str) -> None:
        """See Sender. Raises PublishError if there is not enough shared memory."""
        flat = self._memory.fill([tensor for _, tensor in bucket])
        self._wait()
        # one message for each reader: torch counts a reader with each message that it makes
        messages = [
            {"serialized_named_tensors": [bucket_message(bucket, flat) for _ in range(control.address.tensor_parallel)]}
            for control in self._controls.values()
        ]
        calls = start_for_all(
            self._controls.values(), "update_weights_from_tensor", per_server=messages, weight_version=weight_version
        )
        self._count += 1
        self._loading = _Loading(f"bucket {self._count}, which begins with {bucket[0][0]}", calls)

    def finish(self) -> None:
        self._wait()

    def close(self) -> None:
        self._controls, self._loading = {}, None

    def _wait(self) -> None:
        if self._loading is None:
            return
        loading, self._loading = self._loading, None
        loading.calls.results()
        if failures := loading.calls.failures():
            raise ServersFailed({index: f"{line} ({loading.bucket})" for index, line in failures.items()})


def bucket_message(bucket: Sequence[tuple[str, Tensor]], flat: Tensor) -> str:
    """The message by which one process of a server finds the tensors of `bucket`, whose bytes are in `flat`, a part of
    shared memory: in base64, of the form that SGLang 0.5.23 calls flattened_bucket."""
    ends = list(accumulate(tensor.nbytes for _, tensor in bucket))
    places = [
        SimpleNamespace(
            name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=end - tensor.nbytes, end_idx=end,
            numel=tensor.nbytes,
        )
        for (name, tensor), end in zip(bucket, ends, strict=True)
    ]  # fmt: skip
    written = io.BytesIO()
    with _memory_is_named():
        ForkingPickler(written).dump({"flattened_tensor": flat, "metadata": places})
    return base64.b64encode(written.getvalue()).decode()


def shared_bytes(num_bytes: int) -> Tensor:
    """Uninitialized uint8 [num_bytes] in shared memory. Raises PublishError if there is not enough."""
    try:
        with _memory_is_named():
            return torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        free = as_size(free_bytes(SHARED_MEMORY))
        raise PublishError(
            f"publish.transport = shared_memory: one of two buckets needs {as_size(num_bytes)} of shared memory, and "
            f"{SHARED_MEMORY} has {free} free: enlarge it (docker run --shm-size), lower publish.bucket_bytes, or set "
            "publish.transport to broadcast, or to disk with server.placement = shared"
        ) from None


@contextmanager
def _memory_is_named() -> Iterator[None]:
    """Context manager: shared memory has a name by which every process of this user can open it. With torch's default
    a process would ask this one for a file descriptor, with a secret that only its children know."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
