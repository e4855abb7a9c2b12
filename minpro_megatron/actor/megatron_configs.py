"""Megatron-Core's configurations of the optimizer and of the gradient buffers, from a run's settings."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from minpro_megatron.actor.library_fields import field_values
from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.config.parallel import ParallelConfig


def optimizer_config(config: OptimizerConfig, dtype: torch.dtype) -> MegatronOptimizerConfig:
    """`dtype`: of the weights. Raises UserError if optimizer.megatron does not fit Megatron's class."""
    fields = {
        "optimizer": "adam",
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "adam_eps": config.epsilon,
        "clip_grad": config.clip_grad,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_distributed_optimizer": True,
        **(_offload_fields(config) if config.cpu_offload else {}),
    }
    return MegatronOptimizerConfig(
        **fields | field_values(MegatronOptimizerConfig, "optimizer.megatron", config.megatron)
    )


def _offload_fields(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": config.cpu_offload,
        "overlap_cpu_optimizer_d2h_h2d": True,
        # otherwise the float32 weights would stay on the GPU in addition to their copies on the host
        "use_precision_aware_optimizer": True,
    }


def ddp_config(config: ParallelConfig) -> DistributedDataParallelConfig:
    """Raises UserError if parallel.ddp does not fit Megatron's class."""
    fields: dict[str, Any] = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True}
    return DistributedDataParallelConfig(
        **fields | field_values(DistributedDataParallelConfig, "parallel.ddp", config.ddp)
    )
