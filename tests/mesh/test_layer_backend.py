"""Which layer backend a run gets, where Transformer Engine is not installed; with it: test_transformer_engine.py."""

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from minpro_megatron.actor.layer_backend import select_backend
from minpro_megatron.actor.torch_backend import TorchLayers

pytestmark = pytest.mark.mesh

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", CPU, torch.float32),
        ("auto", CUDA, torch.float32),
        ("auto", CUDA, torch.bfloat16),
        ("torch", CUDA, torch.bfloat16),
    ],
    ids=str,
)
def test_torch_is_what_works_everywhere(
    name: str, device: torch.device, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(select_backend(name, device, dtype), TorchLayers)
    assert not caplog.records, "a GPU without Transformer Engine is nothing to warn of"


def test_an_installation_that_does_not_work_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise OSError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", Broken("transformer_engine.pytorch"))
    with caplog.at_level(logging.WARNING):
        assert isinstance(select_backend("auto", CUDA, torch.bfloat16), TorchLayers)
    assert "libcudnn.so.9: cannot open shared object file" in caplog.text
    with pytest.raises(ValueError, match=r"cannot be imported \(libcudnn.so.9: cannot open"):
        select_backend("transformer_engine", CUDA, torch.bfloat16)


def test_asking_for_what_is_not_there_is_an_error() -> None:
    message = r"^model.backend = transformer_engine: it cannot be imported \(No module named 'transformer_engine"
    with pytest.raises(ValueError, match=message + r".*\); install it, or set model.backend to auto or torch"):
        select_backend("transformer_engine", CUDA, torch.bfloat16)
