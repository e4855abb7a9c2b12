"""The trainer's settings: model, optimizer, and how a batch is packed."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section

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
        description="Megatron checkpoint of the same weights, made by tools/convert_checkpoint.py, or the checkpoint "
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


class OptimizerConfig(Section):
    """AdamW and its schedule; the defaults are the paper's (arXiv:2601.22718, Table 3)."""

    learning_rate: float = Field(default=1e-6, ge=0, description="Learning rate after the warm-up; it stays constant.")
    warmup_global_steps: int = Field(
        default=10,
        ge=0,
        description="Number of global steps over which the learning rate grows linearly to learning_rate.",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay rate of AdamW's first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay rate of AdamW's second moment.")
    epsilon: float = Field(default=1e-8, gt=0, description="Term added to AdamW's denominator for numerical stability.")
    weight_decay: float = Field(default=0.1, ge=0, description="Coefficient of AdamW's decoupled weight decay.")
    clip_grad: float = Field(
        default=1.0, ge=0, description="Gradients are scaled down to this global norm; 0 means no limit."
    )
    cpu_offload: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Fraction of the weights whose float32 copies and moments are kept and updated in host memory. It "
        "needs device = cuda and model.dtype = bfloat16.",
    )


class BatchConfig(Section):
    """The batch of a global step and how it is distributed to the ranks."""

    num_prompts: int = Field(default=512, ge=1, description="Number of prompts per global step.")
    responses_per_prompt: int = Field(
        default=8,
        ge=2,
        description="Number of responses per prompt: the prompt group within which advantages are computed.",
    )
    mini_batch_prompts: int = Field(default=32, ge=1, description="Number of prompts per optimizer update.")
    max_tokens_per_row: int = Field(
        default=32768,
        ge=1,
        description="Maximum length of a packed row in tokens, prompts and padding included; it bounds the memory of "
        "activations.",
    )
    dynamic_sampling: bool = Field(
        default=False,
        description="Groups whose rewards are all equal are dropped, and other prompts are sampled in their place.",
    )
    over_sampling: float = Field(
        default=1.0,
        ge=1,
        le=10,
        description="With staleness.mode = delay and dynamic_sampling: number of groups that are sampled for each "
        "group that the batch still needs.",
    )
    packing: bool = Field(
        default=True,
        description="Several sequences are packed into a row (thd); off: every row is one padded sequence.",
    )

    @property
    def updates_per_step(self) -> int:
        return self.num_prompts // self.mini_batch_prompts
