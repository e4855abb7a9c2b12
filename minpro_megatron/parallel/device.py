"""The device of a rank: its CUDA device, or the CPU, for which Megatron-Core's calls must be redirected.

Megatron-Core uses `device="cuda"` and `torch.cuda.current_device()` in many places. On a machine without a GPU those
calls are redirected to the CPU, once per process, by replacing functions of torch. Nothing is replaced if the run's
device is CUDA.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "empty_like",
    "zeros_like",
    "ones_like",
    "randn",
)
_installed = False


def select_device(name: str) -> torch.device:
    """The torch device of this rank for the setting `device`: "cpu", or "cuda" with torchrun's LOCAL_RANK."""
    if name == "cpu":
        install_cpu_device()
        return CPU
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def process_group_backend(device: torch.device) -> str:
    return "gloo" if device.type == "cpu" else "nccl"


def install_cpu_device() -> None:
    """Redirect Megatron-Core's CUDA calls to the CPU in this process. Safe to call twice."""
    global _installed
    if _installed:
        return
    _installed = True
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _redirect_tensor_methods()
    replace_cuda_functions(CPU)
    dist.all_to_all_single = _all_to_all_with_list_splits(dist.all_to_all_single)
    dist.all_gather = _all_gather_of_uneven_sizes(dist.all_gather)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # pinning is a property of CUDA's driver
        return factory(*args, **kwargs)

    return make


def _redirect_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    def cuda_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers sort parameters by "torch.cuda.FloatTensor" and reject any other name.
        name = tensor_type(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) and not args and not kwargs else name

    tensor: Any = torch.Tensor
    tensor.type = cuda_type_name
    tensor.pin_memory = tensor.cuda = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self


class _NoStream:
    """A stream or event on a device that runs all operations in order: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exception: Any) -> None:
        return None

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable:
        if name not in ("wait", "wait_stream", "wait_event", "record", "record_event", "synchronize"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


class _DefaultGenerators:
    """Replaces torch.cuda.default_generators: every index returns the CPU's generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def replace_cuda_functions(current_device: torch.device) -> None:
    """Replaces the functions of torch.cuda that Megatron-Core calls and that need a driver, in this process."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: current_device
    cuda.Stream = cuda.Event = _NoStream
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, lambda *args, **kwargs: _NoStream())
    for name in ("set_device", "synchronize", "_lazy_init"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda.manual_seed = torch.manual_seed
    cuda.default_generators = _DefaultGenerators()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _all_to_all_with_list_splits(all_to_all_single: Callable) -> Callable:
    """Megatron's token dispatcher passes split sizes as tensors, which NCCL's wrapper accepts and gloo's does not."""

    @functools.wraps(all_to_all_single)
    def call(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **rest: Any
    ) -> Any:
        def as_list(sizes: Any) -> Any:
            return sizes.tolist() if torch.is_tensor(sizes) else sizes

        return all_to_all_single(output, input, as_list(output_split_sizes), as_list(input_split_sizes), **rest)

    return call


def _all_gather_of_uneven_sizes(all_gather: Callable) -> Callable:
    """Megatron's token dispatcher gathers tensors of different sizes; gloo gathers only equal shapes.

    Tensors that differ in their first dimension are padded to the longest for the transfer.
    """

    @functools.wraps(all_gather)
    def call(tensor_list: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len({one.shape for one in tensor_list}) == 1:
            return all_gather(tensor_list, tensor, *args, **kwargs)
        longest = max(len(one) for one in tensor_list)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        work = all_gather(gathered, padded, *args, **kwargs)
        assert work is None, "an asynchronous gather of uneven sizes is not supported"
        for one, rows in zip(tensor_list, gathered, strict=True):
            one.copy_(rows[: len(one)])
        return None

    return call
