"""Hidden states, weights and labels for tests of log-probs, and a process group of one rank."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.parallel import log_probs as module

TOKENS, HIDDEN, VOCABULARY, PADDED = 24, 16, 77, 128  # with 4 ranks one has 13 real columns and one has none
ROUNDED = 2**-8  # of a bfloat16 result


@dataclass(frozen=True)
class Case:
    name: str
    chunk_tokens: int | None = None
    block_columns: int = module.CPU_BLOCK[1]
    temperature: float = 1.0
    scale: float = 1.0  # of the hidden states: large logits underflow in the softmax
    dtype: str = "float32"
    tolerance: float = 2e-5


CASES = [
    Case("plain"),
    Case("one token a chunk, one column a block", chunk_tokens=1, block_columns=1),
    Case("uneven chunks and blocks, temperature", chunk_tokens=5, block_columns=9, temperature=0.7),
    Case("chunk longer than the row, hot", chunk_tokens=1000, temperature=1.6),
    Case("probabilities that underflow", scale=60.0, chunk_tokens=4, block_columns=16, tolerance=2e-3),
    Case("bfloat16", dtype="bfloat16", temperature=0.9, block_columns=7),
]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight with huge padding rows, labels, upstream gradient) of the whole row, in the case's dtype."""
    random = np.random.default_rng(0)
    dtype = getattr(torch, case.dtype)
    hidden = torch.from_numpy(random.normal(0, case.scale, (TOKENS, HIDDEN))).to(dtype)
    weight = torch.from_numpy(random.normal(0, 0.6, (PADDED, HIDDEN)))
    weight[VOCABULARY:] = 9.0
    labels = torch.from_numpy(random.integers(0, VOCABULARY, TOKENS))
    labels[:2] = torch.tensor([0, VOCABULARY - 1])
    upstream = torch.from_numpy(random.normal(0, 1, TOKENS)).float()
    upstream[3] = 0  # a masked token
    return hidden, weight.to(dtype), labels, upstream


class _OneRank:
    """A process group of one rank, which nothing is ever sent over."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


ONE_RANK = cast(dist.ProcessGroup, _OneRank())
