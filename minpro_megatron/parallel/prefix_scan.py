"""Prefix scans over sequences that context and sequence parallelism have cut into pieces.

A scan needs one number a piece: each rank reduces its pieces, all ranks exchange the [sequences, 2] results (2: front
and back chunk), and every rank combines the pieces that come before its own with its local scan. The order along a
sequence is front chunks by (context rank, tensor rank), then back chunks by (context rank descending, tensor rank).
Nothing here is differentiated: objectives use scans in stop-gradient coefficients only.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.objective.scan import IDENTITY, PieceBlock, exclusive_of, reduced


class ShardedScan:
    """Scans for one packed row; see `objective.scan.PrefixScan`. L: slots of this rank."""

    def __init__(
        self,
        sequence_L: Tensor,
        half_L: Tensor,
        mask_L: Tensor,
        *,
        num_sequences: int,
        group: dist.ProcessGroup,
        tensor_size: int,
    ) -> None:
        """`group` holds the tensor x context ranks, tensor ranks fastest; `num_sequences` is the whole row's."""
        self._mask_L = mask_L.bool()
        self._key_L = sequence_L * 2 + half_L
        self._block = PieceBlock.of_runs(self._key_L)
        self._num_sequences = num_sequences
        self._group = group
        context_size = group.size() // tensor_size
        front = [(rank, 0) for rank in range(group.size())]
        back = [
            (context * tensor_size + tensor, 1)
            for context in reversed(range(context_size))
            for tensor in range(tensor_size)
        ]
        order = torch.tensor([2 * rank + half for rank, half in front + back])
        self._order = order.to(sequence_L.device)
        self._place_of = torch.argsort(self._order)  # [2 * ranks]: where in the order (rank, half) stands

    def exclusive(self, values_L: Tensor, operator: str) -> Tensor:
        local = self._lay_out(values_L, operator)
        within_piece = self._block.pick(exclusive_of(local, operator, dim=1))
        before = exclusive_of(self._exchange(local, operator)[self._order], operator, dim=0)  # [2 * ranks, sequences]
        mine = before[self._place_of[2 * self._group.rank() : 2 * self._group.rank() + 2]]  # [2, sequences]
        carried = mine.t().reshape(-1)[self._key_L]
        return torch.minimum(within_piece, carried) if operator == "min" else within_piece + carried

    def whole(self, values_L: Tensor, operator: str) -> Tensor:
        totals = self._exchange(self._lay_out(values_L, operator), operator)
        return reduced(totals, operator, dim=0)[torch.div(self._key_L, 2, rounding_mode="floor")]

    def _lay_out(self, values_L: Tensor, operator: str) -> Tensor:
        identity = IDENTITY[operator]
        return self._block.lay_out(torch.where(self._mask_L, values_L.detach(), identity), identity)

    def _exchange(self, local: Tensor, operator: str) -> Tensor:
        """Every rank's piece totals, [2 * ranks, sequences]; row 2 * rank + half, the identity where it holds none."""
        totals = local.new_full((2 * self._num_sequences,), IDENTITY[operator])
        first_slots = self._block.index[:, 0]
        totals[self._key_L[first_slots]] = reduced(local, operator, dim=1)
        gathered = totals.new_empty(self._group.size() * len(totals))
        if self._group.size() == 1:
            gathered = totals
        else:
            dist.all_gather_into_tensor(gathered, totals, group=self._group)
        by_rank = gathered.view(self._group.size(), self._num_sequences, 2)
        return by_rank.transpose(1, 2).reshape(-1, self._num_sequences)
