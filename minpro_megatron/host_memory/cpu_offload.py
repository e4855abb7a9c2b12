"""Buffers and initial state for Megatron's optimizer in host memory (optimizer.cpu_offload).

Its HybridDeviceOptimizer consists of several optimizers: one for each parameter in host memory, one for all parameters
that stay on the GPU.
"""

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from minpro_megatron.host_memory.host_blocks import host_tensors


def make_gradients(optimizer: HybridDeviceOptimizer) -> None:
    """Allocates host memory for the gradients in a few blocks. Megatron would pin each gradient separately at the first
    update, and torch rounds each up to a power of two: a third more memory for the experts of Qwen3-30B-A3B."""
    copies = list(optimizer.cpu_copys_map_gpu_param)
    for copy, gradient in zip(copies, host_tensors(copies, pinned=True), strict=True):
        optimizer.cpu_copy_map_grad[copy] = gradient.zero_()
        copy.grad = gradient


def make_state(optimizer: HybridDeviceOptimizer) -> None:
    """Sets Adam's moments to zero where no update has made any. Megatron does this by an update with random gradients,
    which would also change the weights."""
    for part in optimizer.sub_optimizers:
        for parameter in (parameter for group in part.param_groups for parameter in group["params"]):
            state = part.state[parameter]
            if "exp_avg" in state:
                continue
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            if isinstance(part, torch.optim.AdamW):  # fused optimizers count their steps in the groups
                state["step"] = torch.tensor(0.0)
    optimizer._sync_sub_optimizers_state_to_hdo()
