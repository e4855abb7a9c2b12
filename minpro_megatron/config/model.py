"""The model and how it is computed."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.config.library_settings import ModelFields
from minpro_megatron.config.path_type import InputPath
from minpro_megatron.errors import UserError

LayerBackendName = Literal["transformer_engine", "torch"]
RecomputedModule = Literal["core_attn", "layernorm", "mlp", "moe_act"]


def layer_backend_of(backend: str, device: str, dtype: str) -> LayerBackendName:
    """The implementation of the layers that the setting model.backend selects for a device and a dtype ("bfloat16",
    ...). Planner, preflight and ranks all decide by it. It does not depend on what is installed: torch's layers need
    more memory and time than the plan states, so they are never a silent fallback for Transformer Engine's."""
    if backend == "auto":
        return "transformer_engine" if device == "cuda" and dtype == "bfloat16" else "torch"
    return "torch" if backend == "torch" else "transformer_engine"


def recomputed_modules(chosen: Sequence[RecomputedModule], fused: bool, mixture: bool) -> tuple[RecomputedModule, ...]:
    """The parts of a layer that model.recompute = selective recomputes; `chosen`: model.recompute_modules, `fused`: the
    layers are Transformer Engine's, `mixture`: they have experts. The model and its plan decide by it.

    Raises UserError for a part that these layers do not have or that Megatron-Core cannot recompute in them.
    """
    if not chosen:
        return (("moe_act", "layernorm") if mixture else ("mlp",)) if fused else ("core_attn",)
    layers = ("Transformer Engine's" if fused else "torch's") + (" of a mixture" if mixture else " of a dense model")
    missing = {
        "mlp": mixture,
        "moe_act": not (fused and mixture),
        "layernorm": fused and not mixture,  # both norms are parts of projections
    }
    if wrong := [module for module in chosen if missing.get(module)]:
        raise UserError(f"model.recompute_modules: {wrong[0]} cannot be recomputed in layers like {layers}; remove it")
    return tuple(chosen)


class ModelConfig(Section):
    """The initial policy and how its layers are computed."""

    hf_path: InputPath = Field(
        description="Hugging Face folder with the architecture, the tokenizer and the parameter names for the export."
    )
    megatron_path: InputPath = Field(
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
        description="Activations that are recomputed in the backward pass to save memory: none, those of the parts "
        "of a layer in recompute_modules (selective), or those of whole layers (full).",
    )
    recompute_modules: tuple[RecomputedModule, ...] = Field(
        default=(),
        description="Parts of every layer that recompute = selective recomputes: attention (core_attn), the norms that "
        "are not fused with a projection (layernorm), a dense feed-forward layer (mlp), the activation of the experts "
        "(moe_act, Transformer Engine only). Empty: core_attn with the torch layers; with Transformer Engine, whose "
        "attention saves little, moe_act and layernorm for a mixture of experts and mlp for a dense model.",
    )
    recompute_layers: int = Field(
        default=0,
        ge=0,
        description="Number of layers that recompute = full recomputes in each stage (in each model chunk of an "
        "interleaved pipeline), its first ones. 0: all layers.",
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

    @field_validator("recompute_modules", mode="before")
    @classmethod
    def _added_up(cls, value: Any) -> Any:
        """Also accepts the form moe_act+layernorm, as parallel.pipeline_layers."""
        return tuple(value.split("+")) if isinstance(value, str) and value else value

    @model_validator(mode="after")
    def _recomputation_is_used(self) -> "ModelConfig":
        for key, needed in (("recompute_modules", "selective"), ("recompute_layers", "full")):
            if getattr(self, key) and self.recompute != needed:
                raise ValueError(
                    f"{key} is for recompute = {needed}, and recompute = {self.recompute}; remove it, or set recompute"
                )
        return self
