"""The memory metrics of a rank."""

import torch

from minpro_megatron.metrics.metric import Metric, largest, total
from minpro_megatron.monitor.memory import own_host_bytes


def rank_memory(device: torch.device) -> dict[str, Metric]:
    """This rank's part of the memory metrics; for its GPU, the peaks since the last call."""
    found = {"memory/host_bytes/train": total(own_host_bytes())}
    if device.type == "cuda":
        found["memory/gpu_allocated_bytes"] = largest(torch.cuda.max_memory_allocated(device))
        found["memory/gpu_reserved_bytes"] = largest(torch.cuda.max_memory_reserved(device))
        torch.cuda.reset_peak_memory_stats(device)
    return found
