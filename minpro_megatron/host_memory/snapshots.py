"""Snapshots of earlier weights of the local shard, stored in host memory and swapped in for scoring."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from minpro_megatron.host_memory.host_blocks import host_tensors


class WeightSnapshots:
    """Named copies of `parameters`. While one is swapped in, the current weights are stored in host memory too."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._kept: dict[str, list[Tensor]] = {}
        self._current: list[Tensor] | None = None  # the current weights while a snapshot is swapped in
        self._swapped_in: str | None = None

    def refuse_while_swapped(self, what: str) -> None:
        assert self._swapped_in is None, f"{what}: the {self._swapped_in!r} weights are swapped in"

    @torch.no_grad()
    def keep(self, name: str) -> None:
        """Copy the current weights to the snapshot `name`, which may exist already."""
        self.refuse_while_swapped(f"keep({name!r})")
        if name not in self._kept:
            self._kept[name] = host_tensors(self._parameters)
        self._copy_out(self._kept[name])

    @contextmanager
    def swapped_in(self, name: str) -> Iterator[None]:
        """Context manager: inside it the parameters have the values of snapshot `name` and must not be changed."""
        assert name in self._kept, f"there are no {name!r} weights: keep({name!r}) comes first"
        self.refuse_while_swapped(f"swapped_in({name!r})")
        self._current = self._current or host_tensors(self._parameters)
        self._copy_out(self._current)
        self._copy_in(self._kept[name])
        self._swapped_in = name
        try:
            yield
        finally:
            # copied in place: the float32 optimizer's master weights are views of the same memory
            self._copy_in(self._current)
            self._swapped_in = None

    @torch.no_grad()
    def _copy_out(self, into: Sequence[Tensor]) -> None:
        for kept, parameter in zip(into, self._parameters, strict=True):
            kept.copy_(parameter)

    @torch.no_grad()
    def _copy_in(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
