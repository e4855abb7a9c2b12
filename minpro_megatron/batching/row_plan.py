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
        lengths = [padded_length(sequence, self.place.context_size) for sequence in sequences]
        rows = self._rows(lengths)
        if wanted is not None:
            rows = [row for row in rows if any(wanted[index] for index in row)]
        rows += [[] for _ in range(-len(rows) % self.multiple)]
        padding = [padding_sequences(len(row), self.place.context_size) if self.pads_counts else [] for row in rows]
        computed = [
            self._computed_lengths([*(lengths[index] for index in row), *extra])
            for row, extra in zip(rows, padding, strict=True)
        ]
        costs = [sum(map(self.cost.of, of_row)) for of_row in computed]
        shares = share_rows(costs, self.data_size)
        shards = [
            shard_row([sequences[index] for index in rows[row]], sum(computed[row]), self.place, padding[row])
            for row in shares[self.data_rank]
        ]
        real, total = sum(sequence.num_tokens for sequence in sequences), sum(map(sum, computed))
        return shards, {
            "batch/padding_fraction": mean(total - real, total),
            "batch/imbalance": mean(imbalance(costs, shares), 1),
        }

    def _rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """The indices of the sequences in each row."""
        if not self.packing:
            return [[index] for index in range(len(lengths))]
        costs = [self.cost.of(length) for length in lengths]
        return pack_rows(lengths, costs, self.max_tokens_per_row, self.multiple)

    def _computed_lengths(self, lengths: Sequence[int]) -> list[int]:
        """The lengths of a row's sequences as they are computed, with the row's padding."""
        return with_row_padding(lengths, row_length(lengths, self.place.context_size, self.place.tensor_size))
