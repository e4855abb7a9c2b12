"""The optimizer and its learning rate."""

from typing import Literal

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.config.library_settings import OptimizerFields


class OptimizerConfig(Section):
    """AdamW and its schedule; the defaults are the paper's (arXiv:2601.22718, Table 3)."""

    learning_rate: float = Field(default=1e-6, ge=0, description="Learning rate after the warm-up, its largest value.")
    warmup_global_steps: int = Field(
        default=10,
        ge=0,
        description="Number of global steps over which the learning rate grows linearly to learning_rate.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="The learning rate after the warm-up: constant, or a linear or cosine decay to min_learning_rate.",
    )
    decay_global_steps: int | None = Field(
        default=None,
        ge=1,
        description="Number of global steps, with those of the warm-up, after which the decay has reached "
        "min_learning_rate; usually num_global_steps. linear and cosine need it: a run that is extended keeps it.",
    )
    min_learning_rate: float = Field(
        default=0.0,
        ge=0,
        description="Learning rate at the end of the decay and after it; the warm-up starts below it.",
    )
    scale_by_effective_sample_size: bool = Field(
        default=False,
        description="Multiply the learning rate of each update by sqrt(min(1, rho / reference_effective_sample_size)), "
        "where rho is ratio/sequence_effective_sample_size of its mini-batch (arXiv:2602.17616).",
    )
    reference_effective_sample_size: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Effective sample size, as a share of the mini-batch's sequences, from which the learning rate is "
        "not scaled down; 1 is that of on-policy sequences.",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay rate of AdamW's first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay rate of AdamW's second moment.")
    epsilon: float = Field(default=1e-8, gt=0, description="Term added to AdamW's denominator for numerical stability.")
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        description="Coefficient of AdamW's decoupled weight decay of matrices. Norms and biases do not decay.",
    )
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
    megatron: OptimizerFields = Field(
        default={},
        description="Further fields of Megatron-Core's OptimizerConfig, by its names, such as "
        "optimizer.megatron.pin_cpu_grads=false on the command line. Fields that another setting decides are refused. "
        "The planner does not know them.",
    )

    @model_validator(mode="after")
    def _the_decay_has_steps(self) -> "OptimizerConfig":
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate} must not exceed learning_rate = {self.learning_rate}"
            )
        if self.schedule == "constant":
            return self
        if self.decay_global_steps is None:
            raise ValueError(
                f"decay_global_steps is null: schedule = {self.schedule} needs the number of global steps at whose end "
                "the learning rate is min_learning_rate, such as num_global_steps"
            )
        if self.decay_global_steps <= self.warmup_global_steps:
            raise ValueError(
                f"decay_global_steps = {self.decay_global_steps} must exceed warmup_global_steps = "
                f"{self.warmup_global_steps}, which it includes"
            )
        return self
