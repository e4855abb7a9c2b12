"""The rows of an update as the trainer packs them: their number, and how much longer the busiest ranks work."""

from collections.abc import Sequence
from dataclasses import dataclass

from minpro_megatron.actor.flops import forward_flops
from minpro_megatron.batching.row_plan import RowPlan
from minpro_megatron.batching.row_shard import RankSlice
from minpro_megatron.batching.shards import sequence_multiple
from minpro_megatron.config.model import layer_backend_of
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture


@dataclass(frozen=True)
class UpdateRows:
    """`micro_batches` of each data-parallel rank; `surplus`: time of the busiest ranks above an even division of the
    sequences' own operations, as a share of it. It includes padding, and that the ranks of an expert-parallel group
    wait for each other in every micro-batch."""

    micro_batches: int
    surplus: float


def update_rows(config: RunConfig, architecture: Architecture, sequence_tokens: Sequence[int]) -> UpdateRows:
    """The rows of a mini-batch of sequences with these numbers of tokens."""
    parallel, plan = config.parallel, row_plan(config, architecture)
    rows = plan.rows(padded_lengths(config, sequence_tokens))
    even = sum(map(plan.cost.of, sequence_tokens)) / plan.data_size
    together = max(1, parallel.expert * parallel.expert_tensor // (parallel.tensor * parallel.context))
    groups = [rows.shares[first : first + together] for first in range(0, plan.data_size, together)]
    busiest = max(
        sum(max(rows.costs[row] for row in at_once) for at_once in zip(*group, strict=True)) for group in groups
    )
    return UpdateRows(len(rows.shares[0]), busiest / even - 1)


def padded_lengths(config: RunConfig, sequence_tokens: Sequence[int]) -> list[int]:
    """The numbers of tokens that sequences of `sequence_tokens` take in a row."""
    multiple = sequence_multiple(config.parallel.context)
    return [-(-tokens // multiple) * multiple for tokens in sequence_tokens]


def row_plan(config: RunConfig, architecture: Architecture) -> RowPlan:
    """How the trainer packs its rows; on its first rank."""
    parallel, batch = config.parallel, config.batch
    return RowPlan(
        place=RankSlice(parallel.context, 0, parallel.tensor, 0),
        data_size=parallel.data_size,
        data_rank=0,
        multiple=parallel.data_size * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1),
        max_tokens_per_row=batch.max_tokens_per_row,
        packing=batch.packing,
        pads_counts=layer_backend_of(config.model.backend, config.device, config.model.dtype) != "torch",
        cost=forward_flops(architecture),
    )
