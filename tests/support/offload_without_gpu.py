"""Megatron's optimizer offload where there is no GPU: tensors pass for a GPU's until Megatron copies them to the host.

What it then does with them, and all of the optimizer's arithmetic, is real.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _OnHost(torch.Tensor):
    """A tensor that megatron has copied to the host, and what is computed from it."""


@contextmanager
def _tensors_pass_for_the_gpus() -> Iterator[None]:
    tensor: Any = torch.Tensor
    pin = tensor.pin_memory
    tensor.is_cuda = property(lambda self: not isinstance(self, _OnHost))
    tensor.pin_memory = lambda self: self.as_subclass(_OnHost)  # what megatron does to each copy on the host
    try:
        yield
    finally:
        tensor.pin_memory = pin
        del tensor.is_cuda


def offload_works_here() -> None:
    """In this process, from now on."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    hybrid: Any = HybridDeviceOptimizer
    sort = hybrid._get_sub_optimizer_param_groups

    def sort_as_on_a_gpu(self: Any, fraction: float) -> Any:
        with _tensors_pass_for_the_gpus():
            return sort(self, fraction)

    hybrid._get_sub_optimizer_param_groups = sort_as_on_a_gpu
