"""An objective over a mini-batch of whole sequences in one process: nothing is cut, nothing is exchanged."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.objective import ObjectiveSection
from minpro_megatron.objective.across_ranks.ranking import OneRank
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.registry import Objective
from minpro_megatron.objective.terms import MiniBatch, PolicyTokens, policy_tokens, summed_loss
from tests.mesh.reference import BatchLoss


def objective_loss(objective: Objective, settings: ObjectiveSection, seed: int) -> BatchLoss:
    """The mean that `settings.aggregation` says over all tokens or over all sequences that have a trained one."""

    def loss(sequences: Sequence[TokenSequence], log_probs: list[Tensor]) -> Tensor:
        tokens = tokens_of(sequences, log_probs)
        if objective.survey is not None:
            (surveyed,) = objective.survey(MiniBatch([tokens], OneRank(), seed), settings)
            tokens = replace(tokens, surveyed_L=surveyed)
        weight, count = tokens.mask_L, float(tokens.mask_L.sum())
        if settings.aggregation == "sequence_mean":
            trained = [sequence.num_trained_tokens for sequence in sequences]
            weight = weight / _per_token(sequences, [max(1, number) for number in trained])
            count = float(np.count_nonzero(trained))
        return summed_loss(torch.cat(log_probs), objective.terms(tokens, settings), weight) / count

    return loss


def tokens_of(sequences: Sequence[TokenSequence], log_probs: list[Tensor]) -> PolicyTokens:
    flat = torch.cat(log_probs).detach()

    def joined(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(flat.dtype)

    mask = joined([sequence.loss_mask for sequence in sequences])
    return policy_tokens(
        flat,
        joined([sequence.behavior_log_probs for sequence in sequences]),
        _per_token(sequences, [sequence.advantage for sequence in sequences]).to(flat.dtype),
        mask,
        WholeSequenceScan(_per_token(sequences, list(range(len(sequences)))), mask),
        torch.cat([sequence.first_slot + torch.arange(len(sequence.response_ids)) for sequence in sequences]),
    )


def _per_token(sequences: Sequence[TokenSequence], values: Sequence[float]) -> Tensor:
    lengths = torch.tensor([len(sequence.response_ids) for sequence in sequences])
    return torch.tensor(values).repeat_interleave(lengths)
