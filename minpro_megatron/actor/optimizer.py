"""Megatron's distributed optimizer for the chunks of a policy."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.host_memory import cpu_offload


def make_optimizer(config: OptimizerConfig, chunks: Sequence[Any]) -> Any:
    """The optimizer of `chunks`, which are wrapped in DistributedDataParallel. For a mixture of experts it is a chain
    of two: one for dense parameters, one for experts."""
    optimizer: Any = get_megatron_optimizer(_megatron_config(config, chunks[0].config.params_dtype), list(chunks))
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    # In megatron-core 0.19.2 the step of each part gathers the parameters of all parts, so that a chain of two gathers
    # the whole model twice. They step in order: the last one gathers what all have updated.
    for part in parts[:-1]:
        part._defer_param_sync = True
    if config.cpu_offload:
        for part in parts:
            cpu_offload.make_gradients(part.optimizer)
    return optimizer


def _megatron_config(config: OptimizerConfig, dtype: torch.dtype) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=True,
        **(_offload_settings(config) if config.cpu_offload else {}),
    )


def _offload_settings(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": config.cpu_offload,
        "overlap_cpu_optimizer_d2h_h2d": True,
        # otherwise the float32 weights would stay on the GPU in addition to their copies on the host
        "use_precision_aware_optimizer": True,
    }
