"""Collectives on tensors over the ranks of a group: implements `objective.across_ranks.ranking.Ranks`."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class GroupRanks:
    """The ranks of `group`; all ranks call the methods in the same order."""

    group: dist.ProcessGroup

    def sum(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.MAX)

    def gather(self, values: Tensor) -> Tensor:
        length = torch.tensor([len(values)], device=values.device)
        lengths = [torch.empty_like(length) for _ in range(self.group.size())]
        dist.all_gather(lengths, length, group=self.group)
        counts = [int(count) for count in lengths]
        padded = values.new_zeros(max(counts))  # gloo and NCCL gather only equal shapes
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        result = values.clone()
        dist.all_reduce(result, op=operation, group=self.group)
        return result
