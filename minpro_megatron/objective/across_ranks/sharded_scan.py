"""Prefix scans over sequences that context and sequence parallelism have sharded.

A scan needs one number per piece: each rank reduces its pieces, all ranks exchange the [sequences, 2] results (2: front
and back chunk), and every rank combines the pieces that come before its own with its local scan. The order along a
sequence is front chunks by (context rank, tensor rank), then back chunks by (context rank descending, tensor rank).
Nothing here is differentiated: objectives use scans only in stop-gradient coefficients.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.objective.across_ranks.scan import IDENTITY, Operator, Runs, combined, unmasked

# `objective.loss_functions` is also used with other versions of torch: before 2.14 it has another name.
_gather_into = vars(dist).get("all_gather_single") or vars(dist)["all_gather_into_tensor"]


@cache  # a copy to a GPU waits for running kernels: once per mesh instead of once per micro-batch
def _order_of_pieces(num_ranks: int, tensor_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """([2 * ranks] pieces 2 * rank + half in the order of the sequence, [2 * ranks] position of each piece in it)."""
    front = [(rank, 0) for rank in range(num_ranks)]
    back = [
        (context * tensor_size + tensor, 1)
        for context in reversed(range(num_ranks // tensor_size))
        for tensor in range(tensor_size)
    ]
    order = torch.tensor([2 * rank + half for rank, half in front + back])
    return order.to(device), torch.argsort(order).to(device)


class ShardedScan:
    """Scans for one packed row; see `objective.across_ranks.scan.PrefixScan`. L: slots of this rank."""

    def __init__(
        self,
        sequence_L: Tensor,
        half_L: Tensor,
        mask_L: Tensor,
        *,
        num_sequences: int,
        group: dist.ProcessGroup,
        tensor_size: int,
        longest: int | None = None,
    ) -> None:
        """`group` has the tensor x context ranks, tensor ranks fastest. `num_sequences` is the number of sequences of
        the whole row, and `longest` the number of slots of its longest sequence."""
        self._mask_L = mask_L.bool()
        self._runs = Runs.of(sequence_L * 2 + half_L, longest)
        self._num_sequences = num_sequences
        self._group = group
        self._order, self._place_of = _order_of_pieces(group.size(), tensor_size, sequence_L.device)

    def exclusive(self, values_L: Tensor, operator: Operator) -> Tensor:
        running = self._local(values_L, operator)
        return self._exclusive(running, self._exchange(running, operator), operator)

    def inclusive(self, values_L: Tensor, operator: Operator) -> Tensor:
        running = self._local(values_L, operator)
        return combined(self._carried(self._exchange(running, operator), operator), running, operator)

    def whole(self, values_L: Tensor, operator: Operator) -> Tensor:
        return self._whole(self._exchange(self._local(values_L, operator), operator), operator)

    def exclusive_and_whole(self, values_L: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
        running = self._local(values_L, operator)
        pieces = self._exchange(running, operator)
        return self._exclusive(running, pieces, operator), self._whole(pieces, operator)

    def _local(self, values_L: Tensor, operator: Operator) -> Tensor:
        return self._runs.running(unmasked(values_L, self._mask_L, operator), operator)

    def _exclusive(self, running_L: Tensor, pieces: Tensor, operator: Operator) -> Tensor:
        return combined(self._carried(pieces, operator), self._runs.shifted(running_L, operator), operator)

    def _whole(self, pieces: Tensor, operator: Operator) -> Tensor:
        by_sequence = pieces.amin(0) if operator == "min" else pieces.sum(0)
        return by_sequence[torch.div(self._runs.key_L, 2, rounding_mode="floor")]

    def _carried(self, pieces: Tensor, operator: Operator) -> Tensor:
        """The reduction of all pieces before the slot's own, for every slot; `pieces` as returned by `_exchange`."""
        pieces = pieces[self._order]
        running = pieces.cummin(0).values if operator == "min" else pieces.cumsum(0)
        before = torch.cat([torch.full_like(pieces[:1], IDENTITY[operator]), running[:-1]])  # [2 * ranks, sequences]
        mine = before[self._place_of[2 * self._group.rank() : 2 * self._group.rank() + 2]]  # [2, sequences]
        return mine.t().reshape(-1)[self._runs.key_L]

    def _exchange(self, running_L: Tensor, operator: Operator) -> Tensor:
        """Every rank's piece totals, [2 * ranks, sequences]; row 2 * rank + half, the identity without slots."""
        totals = self._runs.totals(running_L, 2 * self._num_sequences, operator)
        gathered = totals.new_empty(self._group.size() * len(totals))
        if self._group.size() == 1:
            gathered = totals
        else:
            _gather_into(gathered, totals, group=self._group)
        by_rank = gathered.view(self._group.size(), self._num_sequences, 2)
        return by_rank.transpose(1, 2).reshape(-1, self._num_sequences)
