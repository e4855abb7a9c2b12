"""Lets torch run fake CUDA tensors on a machine without a CUDA driver.

FakeTensorMode allocates nothing and starts no kernel, but torch and Megatron also ask the CUDA driver for streams,
random states and contexts. This file answers for it: first in Python, by replacing functions of torch.cuda, then in
one place in C++ that Python cannot reach.

That place is autograd. Before it runs a backward pass, torch's engine looks for streams on every device that has a
CUDA context (CUDAHooks::hasPrimaryContext in libtorch_cuda.so), and this question raises an error if there is no
driver. `_deny_contexts` overwrites the first three bytes of that function, in the memory of this process only, with
the instructions for "return false". Nothing on disk changes. A torch built without CUDA, or a machine with a driver,
needs no change, and nothing is overwritten there. Torch 2.14 has no function for this: a backend that is registered as
PrivateUse1 with its own contexts takes the place of CUDA in the engine, which then fails for CUDA tensors.

Everything replaced here stays replaced for the rest of the process: a process that rehearses does nothing else.
"""

import ctypes
import functools
import mmap
import platform
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from minpro_megatron.errors import UserError
from minpro_megatron.parallel.device import replace_cuda_functions

DEVICE = torch.device("cuda", 0)
_HAS_PRIMARY_CONTEXT = b"_ZNK2at4cuda6detail9CUDAHooks17hasPrimaryContextEa"
_RETURN_FALSE = b"\x31\xc0\xc3"  # x86-64: xor eax, eax; ret
_SYMBOL_TABLE = 2  # section type SHT_SYMTAB of the ELF format


def install(compiled: Callable[[Callable], Callable]) -> None:
    """Replaces what needs a driver. Before megatron is imported. `compiled` takes the place of torch.compile."""
    library = _loaded_library("libtorch_cuda.so")
    if library is not None and not torch.cuda.is_available():
        _deny_contexts(*library)
    torch.autograd.set_multithreading_enabled(False)  # the dispatch modes belong to this thread
    any_torch: Any = torch
    any_torch.compile = lambda function=None, **options: compiled(function) if function else compiled
    _replace_cuda_functions()
    _replace_methods()


def _loaded_library(name: str) -> tuple[Path, int] | None:
    """(file, address of its first byte) of a library that this process has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f"/{name}"):
            return Path(line[line.index("/") :]), int(line.split("-")[0], 16)
    return None


def _deny_contexts(library: Path, base: int) -> None:
    if platform.machine() != "x86_64":
        raise UserError(
            f"rehearse: on a machine without a CUDA driver it needs an x86-64 processor, not {platform.machine()}; run "
            "it there, on a machine with a GPU, or with a torch built without CUDA"
        )
    offset = _symbol_value(library, _HAS_PRIMARY_CONTEXT)
    if offset is None:
        raise UserError(
            f"rehearse: {library} of torch {torch.__version__} has no function CUDAHooks::hasPrimaryContext, which "
            "must be answered for the missing CUDA driver; run it on a machine with a GPU, or with a torch built "
            "without CUDA"
        )
    address = base + offset
    page = address - address % mmap.PAGESIZE
    length = address + len(_RETURN_FALSE) - page
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    readable_code = mmap.PROT_READ | mmap.PROT_EXEC
    if protect(page, length, readable_code | mmap.PROT_WRITE):
        raise UserError("rehearse: this system does not let a process change its own code; run it on another machine")
    ctypes.memmove(address, _RETURN_FALSE, len(_RETURN_FALSE))
    protect(page, length, readable_code)


def _symbol_value(library: Path, symbol: bytes) -> int | None:
    """The address of a local symbol relative to the start of an ELF library; None if there is no such symbol."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        (sections_at,) = struct.unpack_from("<Q", content, 0x28)
        size, count = struct.unpack_from("<HH", content, 0x3A)
        sections = [struct.unpack_from("<IIQQQQIIQQ", content, sections_at + size * n) for n in range(count)]
        for _, kind, _, _, start, length, names_section, _, _, _ in sections:
            if kind != _SYMBOL_TABLE:
                continue
            names_at, names_length = sections[names_section][4:6]
            name_at = content.find(b"\0" + symbol + b"\0", names_at, names_at + names_length)
            if name_at < 0:
                continue
            entry = np.dtype([("name", "<u4"), ("kind", "<u4"), ("value", "<u8"), ("size", "<u8")])
            symbols = np.frombuffer(content[start : start + length], entry)
            found = symbols["value"][symbols["name"] == name_at + 1 - names_at]
            return int(found[0]) if len(found) else None
    return None


def _replace_cuda_functions() -> None:
    replace_cuda_functions(DEVICE)
    cuda: Any = torch.cuda
    for name in ("empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    # Megatron and Transformer Engine ask for the GPU (an H100 here) to choose their kernels
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.get_device_name = lambda *args: "NVIDIA H100 80GB HBM3"
    cuda.get_device_properties = lambda *args: SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=79 * 2**30
    )
    cuda.is_current_stream_capturing = lambda: False
    # random states are no tensors of the run: one real state, made once, stands for all
    any_torch: Any = torch
    any_torch.get_rng_state = functools.cache(torch.get_rng_state)
    any_torch.set_rng_state = lambda state: None
    cuda.set_rng_state = cuda.random.set_rng_state = lambda *args, **kwargs: None


def _replace_methods() -> None:
    fake: Any = FakeTensor
    values = fake.tolist
    # `known_values`: the few values on which Megatron's control flow depends (rehearsal/unknown_values.py)
    fake.tolist = lambda self: getattr(self, "known_values", None) or values(self)
    fake.record_stream = lambda self, stream: None
    fake.numpy = _zeros
    module: Any = torch.nn.Module
    module.to = _moved


def _zeros(tensor: Any, **kwargs: Any) -> np.ndarray:
    name = "float32" if tensor.dtype == torch.bfloat16 else str(tensor.dtype).removeprefix("torch.")
    return np.zeros(tuple(tensor.shape), name)


def _moved(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Module.to for a device: torch's own exchanges the content of parameters, which fake tensors do not allow."""
    for name, parameter in list(module.named_parameters()):
        if parameter.device != device:
            owner, _, own_name = name.rpartition(".")
            moved = torch.nn.Parameter(parameter.detach().to(device))
            vars(moved).update({key: value for key, value in vars(parameter).items() if key not in vars(moved)})
            setattr(module.get_submodule(owner), own_name, moved)
    return module
