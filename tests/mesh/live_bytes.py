"""How many bytes of tensors are alive at once, counted by watching every operator."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within: `peak` is the most bytes that storages made within have held at any moment between two operators.

    What an operator allocates for itself and frees again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs or {})) if _is_plain(leaf)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if _is_plain(leaf):
                self._seen(leaf, given)
        self._count()
        return out

    def _seen(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live and storage._cdata not in given:
            self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def _count(self) -> None:
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        self.now = sum(size for _, size in self._live.values())
        self.peak = max(self.peak, self.now)


def _is_plain(value: Any) -> bool:
    """Not one of oneDNN's own layout, whose memory cannot be looked at."""
    return isinstance(value, Tensor) and value.layout == torch.strided
