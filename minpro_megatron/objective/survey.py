"""Surveys: statistics of the whole optimizer mini-batch that some objectives need before the gradient is computed.

A survey runs after a forward-only pass over the mini-batch under the current weights, on every rank that has tokens.
It returns one number for each of the rank's own tokens, which the objective reads in `surveyed_L`. The selections are
exact over all ranks and micro-batches (`objective.across_ranks.ranking`); only histograms are exchanged. A token whose
ratio is NaN is never excluded, so that the loss shows it. A mini-batch without trained tokens is not an error.

Only these objectives need the extra pass, in every update: one forward in addition to forward and backward, so about a
third more computation (a quarter more if activations are recomputed). The behavior log-probs cannot replace it: the
selection depends on the current weights, which each update changes.
"""

import torch
from torch import Tensor

from minpro_megatron.objective.terms import MiniBatch


def gather_selected(values: list[Tensor], where: list[Tensor]) -> Tensor:
    """The values of the selected slots of all micro-batches, one after another."""
    return torch.cat([value[chosen] for value, chosen in zip(values, where, strict=True)])


def scatter_selected(found: Tensor, where: list[Tensor], mini_batch: MiniBatch) -> list[Tensor]:
    """The inverse of `gather_selected`: the slots of each micro-batch, 0 where not selected."""
    whole = torch.zeros_like(torch.cat([tokens.log_ratio_L for tokens in mini_batch.micro_batches]))
    whole[torch.cat(where)] = found.to(whole.dtype)
    return list(whole.split([len(chosen) for chosen in where]))  # sizes that the host knows without waiting
