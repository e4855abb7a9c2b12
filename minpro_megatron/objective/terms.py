"""What every objective takes and gives, and the loss made of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minpro_megatron.objective.scan import PrefixScan

LARGEST_LOG_RATIO = 20.0  # exp(20) = 4.9e8 stays finite in float32, and so do products of two


@dataclass(frozen=True)
class PolicyTokens:
    """The local slots that an objective sees; nothing here carries a gradient. L: local slots."""

    log_probs_L: Tensor  # float32, of the current policy
    log_ratio_L: Tensor  # delta_t = log pi - log pi_old, clamped to +-20, 0 where masked
    advantages_L: Tensor
    mask_L: Tensor  # 1 for trained response tokens
    scan: PrefixScan


@dataclass(frozen=True)
class ObjectiveTerms:
    """Per-token results of an objective, all without gradient.

    The loss is a sum over tokens: `value_L` is each token's part of it, and d loss / d log pi_t = -coefficient_t.
    """

    coefficients_L: Tensor
    value_L: Tensor
    weight_L: Tensor  # what multiplies the advantage, after clipping
    clipped_L: Tensor  # bool


def policy_tokens(
    log_probs_L: Tensor, behavior_log_probs_L: Tensor, advantages_L: Tensor, mask_L: Tensor, scan: PrefixScan
) -> PolicyTokens:
    log_probs_L = log_probs_L.detach()
    log_ratio = (log_probs_L - behavior_log_probs_L).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return PolicyTokens(log_probs_L, torch.where(mask_L > 0, log_ratio, 0.0), advantages_L, mask_L, scan)


def prefix_minimum(tokens: PolicyTokens) -> Tensor:
    """m_t = min of the ratios of the sequence's earlier trained tokens, 1 for the first. arXiv:2601.22718, section 4.

    For ratios (1.5, .5, 2, 30, 1) it is (1, 1.5, .5, .5, .5).
    """
    log_minimum = tokens.scan.exclusive(tokens.log_ratio_L, "min")
    return torch.where(log_minimum.isinf(), 1.0, log_minimum.exp())


def summed_loss(log_probs_L: Tensor, terms: ObjectiveTerms, token_weight_L: Tensor) -> Tensor:
    """The sum over local slots of weight x value, with the gradient that the coefficients say. Scalar.

    `token_weight_L` is the mask for token-mean, mask / trained tokens of the sequence for sequence-mean; the caller
    divides by the mini-batch's number of tokens or sequences.
    """
    slope = -(terms.coefficients_L * token_weight_L * log_probs_L).sum()
    return slope + ((terms.value_L * token_weight_L).sum() - slope).detach()
