"""Per-token values of a mini-batch, from the ranks that computed them to every rank."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minpro_megatron.batching.token_sequence import TokenSequence


def gathered_values(
    outputs: Sequence[dict[str, Any]], names: Sequence[str], sequences: Sequence[TokenSequence], device: torch.device
) -> dict[str, np.ndarray]:
    """The values of all ranks by name, float32 [response tokens of `sequences`, in their order], on every rank.

    `outputs` are this rank's, one for each micro-batch: `slots`, the tokens' indices in the batch's flat array of
    response tokens (-1: no token of it), and `values` by name. All ranks of the default process group call this.
    """
    first = min((sequence.first_slot for sequence in sequences), default=0)
    starts = [sequence.first_slot - first for sequence in sequences]
    spans = [slice(at, at + len(one.response_ids)) for at, one in zip(starts, sequences, strict=True)]
    flat = torch.zeros(len(names), max((span.stop for span in spans), default=0), device=device)
    for output in outputs:
        slots = torch.from_numpy(output["slots"]).to(device)
        for row, name in enumerate(names):
            flat[row, slots[slots >= 0] - first] = output["values"][name][slots >= 0].float()
    # Every token belongs to one rank of the last stage; the others add zero, so the sum is exact.
    dist.all_reduce(flat)
    found = flat.cpu().numpy()
    return {
        name: np.concatenate([found[row, span] for span in spans]) if spans else found[row]
        for row, name in enumerate(names)
    }
