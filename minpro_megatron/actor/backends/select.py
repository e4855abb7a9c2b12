"""Selects the modules that a model's layers are built of: Transformer Engine's, or plain torch's."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from minpro_megatron.actor.backends.torch_backend import TorchLayers
from minpro_megatron.config.model import layer_backend_of
from minpro_megatron.errors import UserError


class LayerBackend(Protocol):
    """The modules of a layer. Both backends compute the same function of the same weights."""

    @property
    def final_norm(self) -> Any:
        """The builder of the norm after the last layer."""
        ...

    def settings(self, mixture: bool) -> dict[str, Any]:
        """The fields of TransformerConfig that the backend sets; `mixture`: the layers have experts."""
        ...

    def layer(self, config: TransformerConfig, mixture: bool) -> ModuleSpec:
        """A decoder layer of the model; `mixture`: its feed-forward network is made of experts."""
        ...

    def build(self, config: TransformerConfig, make: Callable[[], GPTModel]) -> GPTModel:
        """The model that `make` makes with `config`, of this backend's layers."""
        ...


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> LayerBackend:
    """The backend for the setting `model.backend`, as config.model.layer_backend_of decides.

    Raises UserError with the import's own error if the backend is Transformer Engine and it cannot be imported.
    """
    if layer_backend_of(name, device.type, str(dtype).removeprefix("torch.")) == "torch":
        return TorchLayers(device)
    try:
        # imported here because the package exists on GPU machines only
        from minpro_megatron.actor.backends.transformer_engine_backend import TransformerEngineLayers
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # a library, or a part of it, fails to load
        raise UserError(
            f"model.backend = {name}: Transformer Engine cannot be imported ({error}); install it, or set "
            "model.backend to torch"
        ) from error
    return TransformerEngineLayers(device)
