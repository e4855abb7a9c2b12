"""The model and how it is computed."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section
from minpro_megatron.config.library_settings import ModelFields

LayerBackendName = Literal["transformer_engine", "torch"]


def layer_backend_of(backend: str, device: str, dtype: str) -> LayerBackendName:
    """The implementation of the layers that the setting model.backend selects for a device and a dtype ("bfloat16",
    ...). Planner, preflight and ranks all decide by it. It does not depend on what is installed: torch's layers need
    more memory and time than the plan states, so they are never a silent fallback for Transformer Engine's."""
    if backend == "auto":
        return "transformer_engine" if device == "cuda" and dtype == "bfloat16" else "torch"
    return "torch" if backend == "torch" else "transformer_engine"


class ModelConfig(Section):
    """The initial policy and how its layers are computed."""

    hf_path: str = Field(
        description="Hugging Face folder with the architecture, the tokenizer and the parameter names for the export."
    )
    megatron_path: str = Field(
        description="Megatron checkpoint of the same weights, made by `minpro convert`, or the checkpoint "
        "of a run from which hf_path was exported."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Data type of the trainer's weights and activations; the CPU needs float32."
    )
    backend: Literal["auto", "transformer_engine", "torch"] = Field(
        default="auto",
        description="Implementation of the layers. auto selects Transformer Engine with device = cuda and dtype = "
        "bfloat16, where it must be installed, and torch otherwise.",
    )
    attention_backend: Literal["auto", "flash", "fused"] = Field(
        default="auto",
        description="Kernels of Transformer Engine's attention: those of FlashAttention (flash) or of cuDNN (fused), "
        "or its own choice (auto). The torch layers have one attention only.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations that are recomputed in the backward pass to save memory: none, those of attention "
        "(selective), or those of whole layers (full).",
    )
    routing_replay: Literal["none", "scored", "rollout"] = Field(
        default="none",
        description="Replay of MoE routes. scored: updates route every token to the experts that were chosen when its "
        "behavior log-prob was computed (R2). rollout: scoring and updates route it to the experts that the server "
        "chose when it sampled the token (R3). Routes take one byte per token, layer and chosen expert (two bytes with "
        "more than 256 experts), in host memory (scored) or in files of the run folder (rollout).",
    )
    megatron: ModelFields = Field(
        default={},
        description="Further fields of Megatron-Core's TransformerConfig, by its names, which replace the values that "
        "this project sets, such as model.megatron.apply_rope_fusion=false on the command line. Fields that another "
        "setting decides are refused. The planner does not know them.",
    )
