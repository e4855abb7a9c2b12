"""Trainer and servers in turns on the same GPUs (server.placement = shared): memory at each moment, times of copies.

A step's moments: the trainer trains while the servers have released their memory; it keeps its weights while the
servers receive them, and while they generate canaries, which it scores; then the servers sample alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.planning.gpus import GIB, GpuKind
from minpro_megatron.planning.memory import RankMemory, ServerMemory, state_bytes
from minpro_megatron.planning.server_share import static_share

# What an SGLang server keeps after it has released weights and KV cache: CUDA context, NCCL, CUDA graphs. A comment on
# SGLang's pull request 7873 (H200, 8B, tensor parallel 2) has 1.6 + 1.0 + 0.6 GB.
SERVER_RESIDUE_BYTES = 3 * GIB


@dataclass(frozen=True)
class TurnMemory:
    """Bytes on each GPU that trainer and servers share, at each moment of a step; of the trainer's largest rank."""

    training: int
    receiving: int  # servers receive weights
    canaries: int  # servers generate with them, and the trainer scores the tokens
    sampling: int

    @property
    def largest(self) -> int:
        return max(self.training, self.receiving, self.canaries, self.sampling)


def turn_memory(config: RunConfig, gpu: GpuKind, ranks: Sequence[RankMemory], server: ServerMemory) -> TurnMemory:
    # what a server needs besides weights and cache, whatever server.memory_fraction leaves for it
    running = round((1 - static_share(config.server, gpu.memory_bytes)) * gpu.memory_bytes)
    whole_server = server.weights + server.kv_cache + running
    residue = max(rank.context + rank.workspaces for rank in ranks)
    sending = max(rank.weights + rank.publish + rank.context + rank.workspaces for rank in ranks)
    return TurnMemory(
        training=max(rank.total for rank in ranks) + SERVER_RESIDUE_BYTES,
        receiving=sending + server.weights + SERVER_RESIDUE_BYTES,
        canaries=_scoring(ranks) + whole_server,
        sampling=residue + whole_server,
    )


def fitting_share(config: RunConfig, gpu: GpuKind, ranks: Sequence[RankMemory]) -> float:
    """The largest server.memory_fraction, in hundredths, with which servers fit while the trainer scores canaries."""
    left = static_share(config.server, gpu.memory_bytes) - _scoring(ranks) / gpu.memory_bytes
    return int(100 * left) / 100


def _scoring(ranks: Sequence[RankMemory]) -> int:
    """Bytes of the trainer while it scores canaries."""
    return max(rank.weights + rank.canaries + rank.context + rank.workspaces for rank in ranks)


class MovingTimes(NamedTuple):
    """Seconds of copies in a step, on every rank at the same time."""

    to_host: float  # optimizer states before the servers receive weights, and the weights after the canaries
    to_device: float


def moving_times(config: RunConfig, a: Architecture, gpu: GpuKind, host_link_share: float) -> MovingTimes:
    """Over PCIe, for the stage with the most bytes; every GPU has a link of its own. 0 on GPUs of the trainer's own."""
    if not config.server.takes_turns:
        return MovingTimes(0.0, 0.0)
    held = [state_bytes(config, a, stage) for stage in range(config.parallel.pipeline)]
    seconds = max(weights + states for weights, _, states, _ in held) / (gpu.host_bandwidth * host_link_share)
    return MovingTimes(seconds, seconds)
