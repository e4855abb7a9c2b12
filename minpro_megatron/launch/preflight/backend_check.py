"""Checks of `model.backend`: the ranks can import the packages that it requires, and what its layers recompute saves
memory."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from minpro_megatron.config.model import layer_backend_of
from minpro_megatron.config.run import RunConfig

# torch is imported first, as on the ranks: it loads NCCL, which Transformer Engine's core library needs and which may
# exist only in a wheel.
_IMPORT = "import torch, transformer_engine.pytorch"
# Megatron-Core works without a package that is not installed, but not if its import fails in another way.
_IMPORT_AS_MEGATRON = f"try:\n    {_IMPORT}\nexcept ImportError:\n    pass"
# Texts in Transformer Engine's error if a part of it is not installed, and the name of the part.
_PARTS = {
    "Transformer Engine torch lib": "transformer_engine_torch",
    "transformer_engine_torch": "transformer_engine_torch",
    "Transformer Engine core lib": "transformer_engine_cu13 (or _cu12)",
    "TE core package": "transformer_engine_cu13 (or _cu12)",
}


def layer_backend_problems(config: RunConfig) -> Iterator[str]:
    """A line if Transformer Engine has to compute the layers and cannot be imported, or if an incomplete installation
    of it prevents the import of Megatron-Core; with the error of the import and the name of the missing part."""
    model = config.model
    if layer_backend_of(model.backend, config.device, model.dtype) == "transformer_engine":
        if reason := _import_error(_IMPORT):
            yield (
                f"model.backend = {model.backend}: Transformer Engine cannot be imported ({reason}); "
                f"{_install(reason)} (environment/setup.sh does on machines with a GPU), or set model.backend to torch"
            )
    elif find_spec("transformer_engine") and (reason := _import_error(_IMPORT_AS_MEGATRON)):
        yield (
            f"model.backend = {model.backend}: Megatron-Core cannot be imported with this Transformer Engine "
            f"({reason}); {_install(reason)}, or uninstall transformer_engine"
        )


def recomputation_warnings(config: RunConfig) -> Iterator[str]:
    """A line for recomputation that costs time and saves next to nothing. Megatron's own warning of it is not
    printed."""
    model = config.model
    fused = layer_backend_of(model.backend, config.device, model.dtype) == "transformer_engine"
    if fused and "core_attn" in model.recompute_modules:
        yield (
            "model.recompute_modules: core_attn computes Transformer Engine's attention again, and saves only the "
            "statistics of its softmax; remove it, and leave the setting empty for parts that save memory"
        )


def _import_error(code: str) -> str:
    """The last line of the error of a Python process that runs `code`; empty if it succeeds. A separate process,
    because a broken library can end it."""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if not found.returncode:
        return ""
    return (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]


def _install(reason: str) -> str:
    part = next((part for sign, part in _PARTS.items() if sign in reason), None)
    return f"install its part {part} in the same version" if part else "install it"
