"""The rows of an update as the trainer packs them: their number, and how much longer the busiest ranks work."""

from collections.abc import Sequence
from dataclasses import dataclass

from minpro_megatron.actor.flops import forward_flops
from minpro_megatron.batching.packing import pack_rows, share_rows
from minpro_megatron.batching.row_lengths import padding_sequences, row_length, with_row_padding
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
    parallel, batch = config.parallel, config.batch
    cost, data = forward_flops(architecture), parallel.data_size
    multiple = sequence_multiple(parallel.context)
    lengths = [-(-tokens // multiple) * multiple for tokens in sequence_tokens]
    ranks = data * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    rows = [[index] for index in range(len(lengths))]
    if batch.packing:
        rows = pack_rows(lengths, [cost.of(length) for length in lengths], batch.max_tokens_per_row, ranks)
    rows += [[] for _ in range(-len(rows) % ranks)]
    model, row_costs = config.model, []
    pads_counts = layer_backend_of(model.backend, config.device, model.dtype) != "torch"
    for row in rows:
        own = [lengths[index] for index in row]
        own += padding_sequences(len(row), parallel.context) if pads_counts else []
        computed = with_row_padding(own, row_length(own, parallel.context, parallel.tensor))
        row_costs.append(sum(map(cost.of, computed)))
    shares = share_rows(row_costs, data)
    even = sum(map(cost.of, sequence_tokens)) / data
    together = max(1, parallel.expert * parallel.expert_tensor // (parallel.tensor * parallel.context))
    groups = [shares[first : first + together] for first in range(0, data, together)]
    busiest = max(sum(max(row_costs[row] for row in rows) for rows in zip(*group, strict=True)) for group in groups)
    return UpdateRows(len(shares[0]), busiest / even - 1)
