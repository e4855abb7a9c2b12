"""Megatron's distributed optimizer for the chunks of a policy."""

import gc
from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import get_megatron_optimizer

from minpro_megatron.actor.megatron_configs import optimizer_config
from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.host_memory import cpu_offload


def make_optimizer(config: OptimizerConfig, chunks: Sequence[Any]) -> Any:
    """The optimizer of `chunks`, which are wrapped in DistributedDataParallel. For a mixture of experts it is a chain
    of two: one for dense parameters, one for experts."""
    optimizer: Any = get_megatron_optimizer(optimizer_config(config, chunks[0].config.params_dtype), list(chunks))
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    # In megatron-core 0.19.2 the step of each part gathers the parameters of all parts, so that a chain of two gathers
    # the whole model twice. They step in order: the last one gathers what all have updated.
    for part in parts[:-1]:
        part._defer_param_sync = True
    if config.cpu_offload:
        # Megatron makes the optimizer of whole parameters first, then that of the rank's shards. The copies of whole
        # parameters in host memory are in a reference cycle, which would stay until Python looks for cycles.
        gc.collect()
        for part in parts:
            cpu_offload.make_gradients(part.optimizer)
    return optimizer
