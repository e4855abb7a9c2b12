"""The optimizer and its learning rate."""

from pydantic import Field

from minpro_megatron.config.base import Section
from minpro_megatron.config.library_settings import OptimizerFields


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
    megatron: OptimizerFields = Field(
        default={},
        description="Further fields of Megatron-Core's OptimizerConfig, by its names, such as "
        "optimizer.megatron.pin_cpu_grads=false on the command line. Fields that another setting decides are refused. "
        "The planner does not know them.",
    )
