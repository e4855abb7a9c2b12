"""What some objectives must know of the whole optimizer mini-batch before its gradient can be computed.

A survey runs after a forward-only pass over the mini-batch under the current weights, on every rank that holds
tokens, and says one number for each of the rank's own tokens, which the objective then finds in `surveyed_L`. The
selections are exact over all ranks and micro-batches (`objective.ranking`); only histograms are exchanged. A token
whose ratio is NaN is never among those to leave out: it shows in the loss. No trained token at all is no error.

The extra pass is paid for by these objectives alone, in every update: one forward on top of forward and backward,
so about a third more computation (a quarter more where activations are recomputed). It cannot be saved by using the
behavior log-probs: the selection depends on the current weights, which each update changes.
"""

import torch
from torch import Tensor

from minpro_megatron.objective.terms import MiniBatch


def collected(values: list[Tensor], where: list[Tensor]) -> Tensor:
    """The chosen slots' values of all micro-batches, one after another."""
    return torch.cat([value[chosen] for value, chosen in zip(values, where, strict=True)])


def spread_out(found: Tensor, where: list[Tensor], mini_batch: MiniBatch) -> list[Tensor]:
    """The inverse of `collected`: each micro-batch's slots, 0 where not chosen."""
    parts = iter(found.split([int(chosen.sum()) for chosen in where]))
    result = []
    for tokens, chosen in zip(mini_batch.micro_batches, where, strict=True):
        spread = torch.zeros_like(tokens.log_ratio_L)
        spread[chosen] = next(parts).to(spread.dtype)
        result.append(spread)
    return result
