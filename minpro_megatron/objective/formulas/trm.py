"""TRM: the importance ratio as the weight, without the sequences that have left a trust region."""

import torch

from minpro_megatron.config.objective import TrmConfig
from minpro_megatron.objective.formulas.trust_region import DIVERGENCES, ratio_terms
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def trm(tokens: PolicyTokens, settings: TrmConfig) -> ObjectiveTerms:
    """Trust region masking, arXiv:2512.23075: the gradient of -rho A on the sequences that are kept.

    A sequence is excluded as a whole if the largest divergence D_t of its trained tokens exceeds max_divergence
    (TRM-Max), or their mean mean_divergence (TRM-Avg). Its tokens still count in the denominator, as in the paper. For
    D = (.01, .03) and (.06, 0) and max_divergence .05 the first sequence is kept; for mean_divergence .025 both are
    excluded only if their means, .02 and .03, exceed it: the second.

    The paper's D is the KL divergence over the whole vocabulary, which needs all log-probs of the server. Here it is
    estimated from the sampled token (`trust_region` in this folder), a lower bound. The paper's own estimates from
    samples, |log rho| and rho - 1 - log rho, are single draws that may be large where the distributions are close.
    """
    divergence = DIVERGENCES[settings.divergence](tokens)
    outside = torch.zeros_like(tokens.is_trained_L)
    if settings.max_divergence is not None:
        outside |= -tokens.scan.whole(-divergence, "min") > settings.max_divergence
    if settings.mean_divergence is not None:
        mean = tokens.scan.whole(divergence, "sum") / tokens.trained_L.clamp(min=1)
        outside |= mean > settings.mean_divergence
    return ratio_terms(tokens, settings.largest_ratio).without(outside)
