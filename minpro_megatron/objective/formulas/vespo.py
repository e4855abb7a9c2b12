"""VESPO: a smooth function of the product of a sequence's ratios as the weight of all its tokens."""

import torch

from minpro_megatron.config.objective import VespoConfig
from minpro_megatron.objective.formulas.clipped_weight import weighted_terms
from minpro_megatron.objective.terms import MAX_LOG_RATIO, ObjectiveTerms, PolicyTokens


def vespo(tokens: PolicyTokens, settings: VespoConfig) -> ObjectiveTerms:
    """VESPO, arXiv:2602.10693: loss = -sg(phi(W)) A log pi with phi(W) = W^k exp(lambda (1 - W)).

    W is the product of the ratios of the sequence's trained tokens, without a normalization by their number; its
    logarithm is limited to +-20, as in the code of the authors. phi(1) = 1, and phi has its maximum at W = k / lambda.
    Sequences with A >= 0 have (power_positive, decay_positive), the others (power_negative, decay_negative). For the
    defaults (2, 3) and (3, 2) and W = .5, 1, 2 phi is (1.1204, 1, .1991) and (.3398, 1, 1.0827).
    """
    log_product = tokens.scan.whole(tokens.log_ratio_L, "sum").clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    up = tokens.advantages_L >= 0
    power = torch.full_like(log_product, settings.power_negative).masked_fill(up, settings.power_positive)
    decay = torch.full_like(log_product, settings.decay_negative).masked_fill(up, settings.decay_positive)
    weight = (power * log_product + decay * (1 - log_product.exp())).exp()
    return weighted_terms(tokens, weight, clipped_L=torch.zeros_like(tokens.is_trained_L))
