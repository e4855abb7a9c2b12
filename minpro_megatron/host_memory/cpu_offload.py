"""What megatron's optimizer in host memory (optimizer.cpu_offload) needs around it.

Its HybridDeviceOptimizer is several optimizers: one for each parameter kept on the host, one for what stays on the GPU.
"""

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from minpro_megatron.host_memory.host_blocks import host_tensors


def make_gradients(optimizer: HybridDeviceOptimizer) -> None:
    """Host memory for the gradients, in a few blocks. megatron pins each gradient by itself at the first update, which
    torch rounds up to a power of two: a third more for the experts of Qwen3-30B-A3B."""
    copies = list(optimizer.cpu_copys_map_gpu_param)
    for copy, gradient in zip(copies, host_tensors(copies, pinned=True), strict=True):
        optimizer.cpu_copy_map_grad[copy] = gradient.zero_()
        copy.grad = gradient


def make_state(optimizer: HybridDeviceOptimizer) -> None:
    """Moments of zero where no update has made any. megatron's own way, an update with random gradients, would also
    change the weights."""
    for part in optimizer.sub_optimizers:
        for parameter in (parameter for group in part.param_groups for parameter in group["params"]):
            state = part.state[parameter]
            if "exp_avg" in state:
                continue
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            if isinstance(part, torch.optim.AdamW):  # fused optimizers count their steps in the groups
                state["step"] = torch.tensor(0.0)
    optimizer._sync_sub_optimizers_state_to_hdo()
