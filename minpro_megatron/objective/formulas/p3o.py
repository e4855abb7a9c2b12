"""P3O: a cap of the ratio, and a pull toward the sampling policy, both from the effective sample size of the batch."""

from dataclasses import replace

import torch
from torch import Tensor

from minpro_megatron.config.objective import P3oConfig
from minpro_megatron.objective.formulas.clipped_weight import weighted_terms
from minpro_megatron.objective.survey import gather_selected
from minpro_megatron.objective.terms import MiniBatch, ObjectiveTerms, PolicyTokens


def p3o(tokens: PolicyTokens, settings: P3oConfig) -> ObjectiveTerms:
    """P3O, arXiv:2605.12380, equation 12: loss = -sg(min(rho, e)) A log pi + (1 - e) KL, without a clip to set.

    e is the normalized effective sample size of the mini-batch's ratios (`effective_sample_size`), and KL the k3
    estimate of KL(pi || mu) from the sampled token, exp(-d) - 1 + d with d = log rho, as in the code of the authors.
    For ratios (.5, 1, 2) e is .7778 and the weights are (.5, .7778, .7778). `weight_L` is the factor of the advantage
    alone; the KL is in the coefficients. The authors' code limits exp(-d) to exp(10), here d is within +-20.
    """
    assert tokens.surveyed_L is not None, "p3o needs its survey"
    ratio, log_ratio = tokens.log_ratio_L.exp(), tokens.log_ratio_L
    weight = torch.minimum(ratio, tokens.surveyed_L)
    terms = weighted_terms(tokens, weight, weight != ratio)
    inverse, strength = (-log_ratio).exp(), 1 - tokens.surveyed_L
    return replace(
        terms,
        coefficients_L=terms.coefficients_L - strength * (1 - inverse),
        value_L=terms.value_L + strength * (inverse - 1 + log_ratio),
    )


def effective_sample_size(mini_batch: MiniBatch, settings: P3oConfig) -> list[Tensor]:
    """e = (sum rho)^2 / (N sum rho^2) for every token, over the N trained tokens of the mini-batch on all ranks: 1 if
    all ratios are equal, 1 / N if one of them exceeds the others by far. arXiv:2605.12380, equation 11."""
    trained = [tokens.is_trained_L for tokens in mini_batch.micro_batches]
    ratios = gather_selected([tokens.log_ratio_L.exp() for tokens in mini_batch.micro_batches], trained)
    sums = torch.stack([torch.ones_like(ratios), ratios, ratios**2]).sum(1)
    count, total, squares = mini_batch.ranks.sum(sums)
    share = torch.where(count > 0, total**2 / (count * squares), 1.0).clamp(max=1)  # rounding may exceed 1
    return [share.expand_as(tokens.log_ratio_L) for tokens in mini_batch.micro_batches]
