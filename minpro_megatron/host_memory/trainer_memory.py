"""The weights, gradients and optimizer states of a Megatron model, on the device or in host memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from minpro_megatron.host_memory.parked_storages import ParkedStorages, storage_key


class TrainerMemory:
    """Moves what a rank's model and optimizer hold on the device. The gradients are released without a copy: every
    update clears them before it uses them.

    Megatron-Core 0.19.2 has calls for this too. Those for gradient buffers are used here. Those for weights
    (`_ParamAndGradBuffer.offload_to_cpu`) pin each buffer as a whole, up to twice its bytes; those for the optimizer
    (`offload_to_cpu`) use pageable memory and replace the tensors, also the main weights of float32 models, which are
    views of the weights.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: Any) -> None:
        self._chunks = chunks
        self._optimizer = optimizer
        self._weights = ParkedStorages()
        self._states = ParkedStorages()
        self.has_weights = True  # on the device
        self.has_states = True  # gradients and optimizer states on the device

    @property
    def parked_bytes(self) -> int:
        """Bytes in host memory instead of on the device."""
        return self._weights.num_bytes + self._states.num_bytes

    def to_host(self, but_weights: bool = False) -> None:
        """Empties gradients and optimizer states, and the weights unless `but_weights`. Nothing is done twice."""
        if self.has_states:
            self._optimizer.zero_grad()  # its gradients may be views of the buffers, or copies
            for chunk in self._chunks:
                chunk.offload_grad_buffers(empty_cache=False)
            weights = {storage_key(tensor) for tensor in self._weight_tensors()}
            self._states.to_host(one for one in self._state_tensors() if storage_key(one) not in weights)
            self.has_states = False
        if self.has_weights and not but_weights:
            self._weights.to_host(self._weight_tensors())
            self.has_weights = False
        torch.cuda.empty_cache()  # other processes need what the allocator would keep

    def to_device(self) -> None:
        """Everything is on the device again; gradients are zero."""
        if not self.has_weights:
            self._weights.to_device()
            self.has_weights = True
        if not self.has_states:
            self._states.to_device()
            for chunk in self._chunks:
                chunk.restore_grad_buffers()
            self.has_states = True

    def refuse_while_away(self, what: str, but_states: bool = False) -> None:
        assert self.has_weights, f"{what}: the weights are in host memory"
        assert but_states or self.has_states, f"{what}: the optimizer states are in host memory"

    def _weight_tensors(self) -> Iterator[Tensor]:
        yield from (parameter for chunk in self._chunks for parameter in chunk.parameters())

    def _state_tensors(self) -> Iterator[Tensor]:
        """Main weights and moments on the device: optimizer.cpu_offload keeps a part of them in host memory anyway."""
        device = next(self._weight_tensors()).device
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            for adam in (part.optimizer, *getattr(part.optimizer, "sub_optimizers", ())):
                of_groups = [one for group in adam.param_groups for one in group["params"]]
                of_states = [one for state in adam.state.values() for one in state.values() if isinstance(one, Tensor)]
                yield from (one for one in of_groups + of_states if one.device == device)
