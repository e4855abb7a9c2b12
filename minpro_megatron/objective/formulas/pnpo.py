"""PNPO: the geometric mean of the ratios up to a token as its weight."""

import torch

from minpro_megatron.config.objective import PnpoConfig
from minpro_megatron.objective.formulas.clipped_weight import weighted_terms
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def pnpo(tokens: PolicyTokens, settings: PnpoConfig) -> ObjectiveTerms:
    """PNPO, arXiv:2608.01418: loss = -sg(w) A log pi with w_t = (rho_1 ... rho_t)^(1/t), without rejected tokens.

    t counts the trained tokens of the sequence from 1. For ratios (1.5, .5, 2) the weights are (1.5, .8660, 1.1447). A
    token whose weight is outside smallest_weight .. largest_weight is excluded. The paper rejects tokens by the weight
    too; both bounds are off by default, as this project has not been able to verify the paper's values.
    """
    weight = tokens.prefix_mean_log_ratio_L.exp()
    terms = weighted_terms(tokens, weight, clipped_L=torch.zeros_like(tokens.is_trained_L))
    if settings.smallest_weight is not None:
        terms = terms.without(weight < settings.smallest_weight)
    if settings.largest_weight is not None:
        terms = terms.without(weight > settings.largest_weight)
    return terms
