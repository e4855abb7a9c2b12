"""The rows of a mini-batch: which sequences share a row, and which rows each data-parallel rank computes."""

from collections.abc import Sequence
from dataclasses import dataclass

from minpro_megatron.batching.collate import shard_row
from minpro_megatron.batching.packing import SequenceCost, imbalance, pack_rows, share_rows
from minpro_megatron.batching.row_lengths import padded_length, padding_sequences, row_length, with_row_padding
from minpro_megatron.batching.row_shard import RankSlice, RowShard
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.metrics.metric import Metric, mean


@dataclass(frozen=True)
class Rows:
    """The rows of one mini-batch, and of each row: which sequences it has, and what is computed for them."""

    sequences: list[list[int]]  # indices of the mini-batch
    padding: list[list[int]]  # lengths of the sequences of padding after them
    lengths: list[list[int]]  # of all its sequences as they are computed, with the row's padding
    costs: list[float]
    shares: list[list[int]]  # the rows of each data-parallel rank


@dataclass(frozen=True)
class RowPlan:
    """What determines the rows of every mini-batch. All ranks have the same plan, but for their own places in it."""

    place: RankSlice  # this rank among the context and tensor-parallel ranks
    data_size: int
    data_rank: int
    multiple: int  # the number of rows is a multiple of this, and this is one of `data_size`
    max_tokens_per_row: int
    packing: bool  # False: each row has one sequence
    pads_counts: bool  # True: sequences of padding make their number in a row a power of two
    cost: SequenceCost

    def shards(
        self, sequences: Sequence[TokenSequence], wanted: Sequence[bool] | None = None
    ) -> tuple[list[RowShard], dict[str, Metric]]:
        """(this rank's shards of the rows that its data-parallel rank computes, metrics of how well the rows are filled
        and balanced). Rows without a `wanted` sequence are skipped; the other rows are the same as without `wanted`."""
        rows = self.rows([padded_length(sequence, self.place.context_size) for sequence in sequences], wanted)
        shards = [
            shard_row(
                [sequences[index] for index in rows.sequences[row]],
                sum(rows.lengths[row]),
                self.place,
                rows.padding[row],
            )
            for row in rows.shares[self.data_rank]
        ]
        real, total = sum(sequence.num_tokens for sequence in sequences), sum(map(sum, rows.lengths))
        return shards, {
            "batch/padding_fraction": mean(total - real, total),
            "batch/imbalance": mean(imbalance(rows.costs, rows.shares), 1),
        }

    def rows(self, lengths: Sequence[int], wanted: Sequence[bool] | None = None) -> Rows:
        """The rows of a mini-batch of sequences that take `lengths` (row_lengths.padded_length), the same on all
        ranks; `wanted` as in `shards`."""
        if self.packing:
            costs = [self.cost.of(length) for length in lengths]
            rows = pack_rows(lengths, costs, self.max_tokens_per_row, self.multiple)
        else:
            rows = [[index] for index in range(len(lengths))]
        if wanted is not None:
            rows = [row for row in rows if any(wanted[index] for index in row)]
        rows += [[] for _ in range(-len(rows) % self.multiple)]
        padding = [padding_sequences(len(row), self.place.context_size) if self.pads_counts else [] for row in rows]
        computed = [
            self._computed_lengths([*(lengths[index] for index in row), *extra])
            for row, extra in zip(rows, padding, strict=True)
        ]
        row_costs = [sum(map(self.cost.of, of_row)) for of_row in computed]
        return Rows(rows, padding, computed, row_costs, share_rows(row_costs, self.data_size))

    def _computed_lengths(self, lengths: Sequence[int]) -> list[int]:
        """The lengths of a row's sequences as they are computed, with the row's padding."""
        return with_row_padding(lengths, row_length(lengths, self.place.context_size, self.place.tensor_size))
