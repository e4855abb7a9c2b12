"""The space of the routes that routing replay stores: host memory, and files of the run folder (R3)."""

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


def route_host_bytes(config: RunConfig, a: Architecture, batch_tokens: float, ranks_per_node: int) -> int:
    """Bytes on a node with `ranks_per_node` trainer ranks; each has the routes of its own tokens and layers."""
    scored_and_waiting = config.staleness.delay_steps if config.model.routing_replay == "scored" else 0
    of_all_ranks = (scored_and_waiting + 1) * route_bytes(config, a, batch_tokens)
    return round(of_all_ranks * ranks_per_node / config.parallel.world_size)


def route_file_bytes(config: RunConfig, a: Architecture, batch_tokens: float) -> int:
    """Bytes of the files in the run folder at any time (collector/collector.py removes them)."""
    if config.model.routing_replay != "rollout":
        return 0
    return math.ceil(batches_with_routes(config) * route_bytes(config, a, batch_tokens))


def batches_with_routes(config: RunConfig) -> int:
    """The maximum number of batches whose routes are in the run folder at the same time."""
    staleness, checkpoint, collector = config.staleness, config.checkpoint, config.collector
    ahead = staleness.delay_steps if staleness.mode == "delay" else staleness.max_staleness
    # consumed, and not yet in a complete checkpoint: one more step passes while it is written. The number of steps
    # between checkpoints that are saved only by time is not known here.
    between = checkpoint.every_steps or (config.num_global_steps if checkpoint.every_minutes else 0)
    consumed = between + 1
    if collector.journal_keep_routes:
        consumed = max(consumed, collector.journal_keep_steps or config.num_global_steps)
    return ahead + 1 + min(consumed, config.num_global_steps)
