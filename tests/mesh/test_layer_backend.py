"""Which layer backend a run gets, where Transformer Engine is not installed; with it: test_transformer_engine.py."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from minpro_megatron.actor.backends.select import select_backend
from minpro_megatron.actor.backends.torch_backend import TorchLayers

pytestmark = pytest.mark.mesh

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [("auto", CPU, torch.float32), ("auto", CUDA, torch.float32), ("torch", CUDA, torch.bfloat16)],
    ids=str,
)
def test_torch_is_what_works_everywhere(name: str, device: torch.device, dtype: torch.dtype) -> None:
    assert isinstance(select_backend(name, device, dtype), TorchLayers)


@pytest.mark.parametrize(
    "error", [OSError("libcudnn.so.9: cannot open"), AssertionError("version mismatch"), RuntimeError("empty package")]
)
@pytest.mark.parametrize("name", ["auto", "transformer_engine"])
def test_an_installation_that_does_not_work_is_an_error(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise error

    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", Broken("transformer_engine.pytorch"))
    with pytest.raises(ValueError, match=rf"^model.backend = {name}: Transformer Engine cannot be imported \({error}"):
        select_backend(name, CUDA, torch.bfloat16)


@pytest.mark.parametrize("name", ["auto", "transformer_engine"])
def test_what_is_not_there_is_an_error_and_not_replaced_in_silence(name: str) -> None:
    message = rf"^model.backend = {name}: Transformer Engine cannot be imported \(No module named 'transformer_engine"
    with pytest.raises(ValueError, match=message + r".*\); install it, or set model.backend to torch"):
        select_backend(name, CUDA, torch.bfloat16)
