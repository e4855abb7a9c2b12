"""Tensors that leave their device for host memory and come back, bit for bit, while others use the device.

Their storages are emptied and filled again. The tensors and all views of them stay the same objects, so whatever refers
to them stays valid: Megatron's buffers, the optimizer's shards of them, and its states.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from minpro_megatron.host_memory.host_blocks import host_tensors

# Storages are copied in pieces of this size, which fill the blocks of host memory; a storage of 5 GB in one piece would
# take 8 GB of pinned memory.
_PIECE_BYTES = 256 * 2**20


class ParkedStorages:
    """The storages of some tensors, which are on their device or away in host memory. The host memory is kept for the
    next time."""

    def __init__(self) -> None:
        self._away: list[tuple[Tensor, int]] = []  # a tensor of each storage, and the storage's bytes
        self._host: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Bytes that are away in host memory now."""
        return sum(num_bytes for _, num_bytes in self._away)

    @torch.no_grad()
    def to_host(self, tensors: Iterable[Tensor]) -> None:
        """Copies the storages of `tensors`, which may share them, to host memory and empties them."""
        assert not self._away, "they are away already"
        found = {storage_key(one): one for one in tensors if one.untyped_storage().nbytes()}
        pieces = [piece for one in found.values() for piece in _pieces(one)]
        if [piece.nbytes for piece in pieces] != [piece.nbytes for piece in self._host]:
            self._host.clear()  # released before the new memory is allocated
            self._host = host_tensors(pieces)
        for host, piece in zip(self._host, pieces, strict=True):
            host.copy_(piece, non_blocking=True)
        torch.cuda.synchronize()
        self._away = [(one, one.untyped_storage().nbytes()) for one in found.values()]
        for one, _ in self._away:
            one.untyped_storage().resize_(0)

    @torch.no_grad()
    def to_device(self) -> None:
        """Undoes `to_host`."""
        for one, num_bytes in self._away:
            one.untyped_storage().resize_(num_bytes)
        pieces = (piece for one, _ in self._away for piece in _pieces(one))
        for host, piece in zip(self._host if self._away else [], pieces, strict=True):
            piece.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        self._away = []


def storage_key(tensor: Tensor) -> int:
    """The same for tensors that share a storage, while it exists. Its address would not do: a rehearsal's storages
    (docs/rehearsal.md) have none."""
    return tensor.untyped_storage()._cdata


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of the tensor's storage, as tensors in its memory."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    yield from whole.split(_PIECE_BYTES)
