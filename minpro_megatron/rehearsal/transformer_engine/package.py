"""The Python files of Transformer Engine, imported on a machine without a GPU, with shapes in place of its kernels.

Modules, autograd functions, the exchange of keys and values between context ranks and the choice of an attention
backend are the package's own. Only its compiled functions (`transformer_engine_torch`) are replaced: by kernels.py.
"""

import dataclasses
import functools
import importlib
import os
import re
import sys
import warnings
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from minpro_megatron.rehearsal.transformer_engine import kernels
from minpro_megatron.rehearsal.transformer_engine.files import PACKAGE, find_folder

_COMPILED = "transformer_engine_torch"
_USES = re.compile(r"\btex\.([A-Za-z]\w*)")  # of a compiled function or type, in the package's files


def install() -> None:
    """Makes `import transformer_engine` find the package with shapes for kernels, in this process. Before megatron is
    imported. Raises UserError if the package's files are not there, or those of another version."""
    assert not any(name.startswith("megatron") for name in sys.modules), "megatron has already looked for it"
    folder = find_folder()
    compiled = CompiledFunctions(_COMPILED)
    for name, value in vars(kernels).items():
        if isinstance(value, FunctionType) and not name.startswith("_"):
            setattr(compiled, name, value)
    for file in Path(folder, PACKAGE, "pytorch").rglob("*.py"):
        for name in _USES.findall(file.read_text(encoding="utf-8")):
            getattr(compiled, name)  # for `from transformer_engine_torch import *`
    sys.modules[_COMPILED] = compiled
    # needs further packages, and exports models
    exporting = f"{PACKAGE}.pytorch.onnx_extensions"
    sys.modules[exporting] = CompiledFunctions(exporting)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no library is loaded (transformer_engine/common/__init__.py:488)
    sys.path.insert(0, str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common: Any = importlib.import_module(f"{PACKAGE}.common")
        common.load_framework_extension = lambda framework: None
        importlib.import_module(f"{PACKAGE}.pytorch")
    _accept_this_machine()


class CompiledFunctions(ModuleType):
    """A compiled module by its names. A capital begins an enumeration; all other names are functions, and those that
    have no shape raise AssertionError when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = _Enumeration(name, (), {}) if name[0].isupper() else functools.partial(_refuse, name)
        setattr(self, name, made)
        return made


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"{_COMPILED}.{name} has no shape in rehearsal/transformer_engine/kernels.py")


class _Enumeration(type):
    """Has every member that is asked for; its value is the next number."""

    def __getattr__(cls, name: str) -> Any:
        members = {key: value for key, value in vars(cls).items() if isinstance(value, int)}
        if name == "__members__":
            return members
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(members))
        return len(members)


def _accept_this_machine() -> None:
    """Replaces the two questions to which this machine's answers would be wrong: whether it has a GPU, and whether a
    tensor is of the class Tensor."""
    base: Any = importlib.import_module(f"{PACKAGE}.pytorch.module.base").TransformerEngineBaseModule
    initialize = base.__init__

    @functools.wraps(initialize)
    def initialize_without_gpu(self: Any, *args: Any, **kwargs: Any) -> None:
        cuda: Any = torch.cuda
        is_available, cuda.is_available = cuda.is_available, lambda: True
        try:
            initialize(self, *args, **kwargs)
        finally:
            cuda.is_available = is_available

    base.__init__ = initialize_without_gpu
    attention: Any = importlib.import_module(f"{PACKAGE}.pytorch.attention.dot_product_attention.utils")
    select = attention.get_attention_backend
    attention.get_attention_backend = lambda given: select(dataclasses.replace(given, qkv_type=torch.Tensor))
