"""The vocabulary columns to which the softmax of each token is restricted (support replay), on one tensor rank.

Shapes as in parallel/log_probs.py: S tokens of the context shard in tensor-rank order, C tokens of a chunk, B columns
of a block.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptColumns:
    """For each of S tokens the columns of this rank that it keeps. A token without any on all ranks keeps every column:
    prompts, padding and given tokens have nothing to restrict."""

    ends: np.ndarray  # int64 [S + 1], in host memory: token s has the entries ends[s] to ends[s + 1]
    columns: Tensor  # int32 [entries]: columns of this rank, from 0
    is_free_S: Tensor  # bool: the token keeps every column

    @classmethod
    def of(cls, sizes_S: np.ndarray, ids: np.ndarray, first: int, count: int, device: torch.device) -> Self:
        """Those of the rank that has the columns `first` to `first + count`. `ids` are the kept token ids of all tokens
        one after the other, `sizes_S` of each."""
        mine = (ids >= first) & (ids < first + count)
        ends = np.concatenate([[0], np.cumsum(mine, dtype=np.int64)])[np.concatenate([[0], np.cumsum(sizes_S)])]
        columns = torch.from_numpy((ids[mine] - first).astype(np.int32)).to(device, non_blocking=True)
        return cls(ends, columns, torch.from_numpy(sizes_S == 0).to(device, non_blocking=True))

    def chunk(self, part: slice, num_ranks: int) -> "KeptInChunk":
        """Those of the tokens `part` of each of `num_ranks` tensor ranks, as they are gathered. Costs no
        synchronization with the device, because the numbers of entries are known on the host."""
        by_rank = self.is_free_S.view(num_ranks, -1)
        starts = np.arange(num_ranks) * by_rank.shape[1]
        columns = [self.columns[self.ends[one + part.start] : self.ends[one + part.stop]] for one in starts]
        counts = np.concatenate([np.diff(self.ends[one + part.start : one + part.stop + 1]) for one in starts])
        repeats = torch.from_numpy(counts).to(self.columns.device, non_blocking=True)
        rows = torch.repeat_interleave(repeats, output_size=int(counts.sum()))
        return KeptInChunk(rows, torch.cat(columns).long(), by_rank[:, part].reshape(-1))


@dataclass(frozen=True)
class KeptInChunk:
    """Entry i: the gathered token `rows[i]` keeps the column `columns[i]` of this rank."""

    rows: Tensor  # int64 [entries]
    columns: Tensor  # int64 [entries]
    is_free_C: Tensor  # bool

    def mask(self, block: slice) -> Tensor:
        """bool [C, B]: whether the token keeps the column of the block."""
        tokens, columns = len(self.is_free_C), block.stop - block.start
        is_inside = (self.columns >= block.start) & (self.columns < block.stop)
        beyond = (
            tokens * columns
        )  # entries of other blocks go here: to select entries would synchronize with the device
        place = torch.where(is_inside, self.rows * columns + self.columns - block.start, beyond)
        flat = torch.zeros(beyond + 1, dtype=torch.bool, device=place.device)
        flat[place] = True
        return flat[:-1].view(tokens, columns) | self.is_free_C[:, None]
