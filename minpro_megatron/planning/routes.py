"""The space of routes (routing replay) and kept ids (support replay): host memory, and files of the run folder."""

import math

from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture


def route_bytes(config: RunConfig, a: Architecture, batch_tokens: float) -> float:
    """Bytes for a global step's batch of `batch_tokens` tokens, including prompts; 0 without routing replay or
    experts."""
    if config.model.routing_replay == "none":
        return 0.0
    index_bytes = 1 if a.num_experts <= 256 else 2
    return batch_tokens * a.num_layers * a.num_experts_per_token * index_bytes


def support_bytes(config: RunConfig, batch_tokens: float) -> float:
    """Bytes at most for the kept ids of a global step's batch; 0 without sampling.top_k. Each token has its number of
    ids, and with sampling.top_p most have far fewer ids than top_k."""
    top_k = config.sampling.top_k
    return batch_tokens * 4 * (1 + top_k) if top_k else 0.0


def route_host_bytes(config: RunConfig, a: Architecture, batch_tokens: float, ranks_per_node: int) -> int:
    """Bytes on a node with `ranks_per_node` trainer ranks; each has the routes of its own tokens and layers, and on the
    last pipeline stage the kept ids of its context shard."""
    scored_and_waiting = config.staleness.delay_steps if config.model.routing_replay == "scored" else 0
    of_all_ranks = (scored_and_waiting + 1) * route_bytes(config, a, batch_tokens)
    supports = support_bytes(config, batch_tokens) / (config.parallel.context * config.parallel.data_size)
    return round(of_all_ranks * ranks_per_node / config.parallel.world_size + supports * ranks_per_node)


def route_file_bytes(config: RunConfig, a: Architecture, batch_tokens: float) -> int:
    """Bytes of the files in the run folder at any time (collector/collector.py removes them)."""
    of_batch = support_bytes(config, batch_tokens)
    if config.model.routing_replay == "rollout":
        of_batch += route_bytes(config, a, batch_tokens)
    return math.ceil(batches_with_routes(config) * of_batch)


def batches_with_routes(config: RunConfig) -> int:
    """The maximum number of batches whose routes and kept ids are in the run folder at the same time."""
    staleness, checkpoint, collector = config.staleness, config.checkpoint, config.collector
    ahead = staleness.delay_steps if staleness.mode == "delay" else staleness.max_staleness
    # consumed, and not yet in a complete checkpoint: one more step passes while it is written. The number of steps
    # between checkpoints that are saved only by time is not known here.
    between = checkpoint.every_steps or (config.num_global_steps if checkpoint.every_minutes else 0)
    consumed = between + 1
    if collector.journal_keep_routes:
        consumed = max(consumed, collector.journal_keep_steps or config.num_global_steps)
    return ahead + 1 + min(consumed, config.num_global_steps)
