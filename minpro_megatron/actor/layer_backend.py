"""Which modules a model's layers are made of: Transformer Engine's, or plain torch's."""

import logging
from typing import Any, Protocol

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from minpro_megatron.actor.torch_backend import TorchLayers

logger = logging.getLogger(__name__)


class LayerBackend(Protocol):
    """The modules of a layer. Both backends compute the same function of the same weights."""

    @property
    def final_norm(self) -> Any:
        """The builder of the norm after the last layer."""
        ...

    def settings(self, mixture: bool) -> dict[str, Any]:
        """What the backend needs of TransformerConfig, by field; `mixture`: the layers have experts."""
        ...

    def layer(self, config: TransformerConfig) -> ModuleSpec:
        """One decoder layer of a Qwen3 model."""
        ...


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> LayerBackend:
    """The backend for the setting `model.backend`.

    "auto" is Transformer Engine where it can be imported, the device is CUDA and the weights are bfloat16 (its
    attention on packed rows knows no float32), and torch everywhere else. Raises ValueError with the import's own
    error where "transformer_engine" is asked for and cannot be imported.
    """
    if name == "torch" or (name == "auto" and (device.type != "cuda" or dtype != torch.bfloat16)):
        return TorchLayers(device)
    try:
        # late: the package exists on GPU machines only
        from minpro_megatron.actor.transformer_engine_backend import TransformerEngineLayers
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        if name == "auto":
            if getattr(error, "name", None) != "transformer_engine":  # it is installed, and does not work
                logger.warning("model.backend = auto: torch, for Transformer Engine cannot be imported: %s", error)
            return TorchLayers(device)
        raise ValueError(
            f"model.backend = transformer_engine: it cannot be imported ({error}); install it, or set model.backend "
            "to auto or torch"
        ) from error
    return TransformerEngineLayers(device)
