"""What the trainer does with a batch: model, optimizer, packing."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section

LayerBackendName = Literal["transformer_engine", "torch"]


def layer_backend_of(backend: str, device: str, dtype: str) -> LayerBackendName:
    """What the setting model.backend means on a device for a dtype ("bfloat16", ...): the one decision for planner,
    preflight and ranks. It does not ask what is installed: torch's layers need more memory and time than planned, so
    nobody gets them unasked where Transformer Engine's would do."""
    if backend == "auto":
        return "transformer_engine" if device == "cuda" and dtype == "bfloat16" else "torch"
    return "torch" if backend == "torch" else "transformer_engine"


class ModelConfig(Section):
    """The policy's starting point."""

    hf_path: str = Field(description="Hugging Face folder: architecture, tokenizer, names for the export")
    megatron_path: str = Field(
        description="Megatron checkpoint of the same weights: made by tools/convert_checkpoint.py, or the checkpoint "
        "of a run from which hf_path was exported"
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    backend: Literal["auto", "transformer_engine", "torch"] = Field(
        default="auto",
        description="what computes the layers; auto: Transformer Engine with device = cuda and dtype = bfloat16 (it "
        "has to be installed there), torch otherwise",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="activations computed again in backward: attention's (selective) or whole layers'"
    )
    routing_replay: Literal["none", "scored", "rollout"] = Field(
        default="none",
        description="scored: updates route every token to the experts chosen when its behavior log-prob was computed "
        "(R2); rollout: scoring and updates route it to those that the server chose when it sampled (R3). Routes take "
        "one byte per token, layer and chosen expert (two with more than 256 experts): in host memory (scored), or in "
        "files of the run folder (rollout)",
    )


class OptimizerConfig(Section):
    """AdamW and its schedule; the defaults are the paper's (arXiv:2601.22718, Table 3)."""

    learning_rate: float = Field(default=1e-6, ge=0)
    warmup_global_steps: int = Field(default=10, ge=0, description="linear warm-up, in global steps")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0: no limit")
    cpu_offload: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="fraction of the weights whose float32 copies and moments are kept, and updated, in host memory; "
        "needs device = cuda and model.dtype = bfloat16",
    )


class BatchConfig(Section):
    """What one global step consumes and how it reaches the ranks."""

    num_prompts: int = Field(default=512, ge=1, description="prompts a global step")
    responses_per_prompt: int = Field(default=8, ge=2, description="responses a prompt: the group of the advantage")
    mini_batch_prompts: int = Field(default=32, ge=1, description="prompts an optimizer update")
    max_tokens_per_row: int = Field(default=32768, ge=1, description="longest packed row, prompt and padding included")
    dynamic_sampling: bool = Field(
        default=False, description="groups whose rewards are all equal are dropped, and others sampled in their place"
    )
    over_sampling: float = Field(
        default=1.0,
        ge=1,
        le=10,
        description="mode delay with dynamic_sampling: groups issued for each one still wanted",
    )
    packing: bool = Field(default=True, description="several sequences a row (thd); off: one sequence a row, padded")

    @property
    def updates_per_step(self) -> int:
        return self.num_prompts // self.mini_batch_prompts
