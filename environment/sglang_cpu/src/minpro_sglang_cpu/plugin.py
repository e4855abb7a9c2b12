"""The SGLang plugin: two places of SGLang 0.5.23 that call CUDA even when the server runs on a CPU."""

from collections.abc import Callable
from typing import Any

from minpro_sglang_cpu.cuda_driver import find_cuda_driver


def register_hooks() -> None:
    """Register the two hooks with SGLang; called by SGLang in each of its processes.

    With a driver present nothing is registered: the real functions work there. The stand-in `sgl_kernel` raises
    the error, because SGLang logs an exception of a plugin and continues.
    """
    if find_cuda_driver():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # --enable-return-routed-experts keeps the routes in a host buffer, which is page-locked for the GPU
    # whatever device the server runs on (mem_cache/pool_host/common.py): "Found no NVIDIA driver".
    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.common._cuda_host_register", _leave_pageable, HookType.REPLACE
    )
    # /release_memory_occupation synchronises torch.get_device_module(), which is torch.cuda in every CUDA
    # build of torch (managers/scheduler_components/weight_updater.py): it would end the scheduler process.
    HookRegistry.register("torch.get_device_module", _default_to_cpu, HookType.AROUND)


def _leave_pageable(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing: there is no device that would copy from the buffer."""


def _default_to_cpu(get_device_module: Callable[..., Any], device: Any = None) -> Any:
    """torch.get_device_module, with "cpu" where the caller named no device."""
    return get_device_module("cpu" if device is None else device)
