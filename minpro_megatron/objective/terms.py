"""What every objective takes and gives, and the loss made of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from minpro_megatron.objective.ranking import Ranks
from minpro_megatron.objective.scan import PrefixScan

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8 stays finite in float32, and so do products of two


@dataclass(frozen=True)
class PolicyTokens:
    """The local slots that an objective sees; nothing here carries a gradient. L: local slots."""

    log_probs_L: Tensor  # float32, of the current policy
    log_ratio_L: Tensor  # float64: delta_t = log pi - log pi_old, clamped to +-20, 0 where masked
    advantages_L: Tensor
    mask_L: Tensor  # 1 for trained response tokens
    scan: PrefixScan
    ids_L: Tensor  # int64: the token's place among the mini-batch's response tokens, -1 where there is no token
    surveyed_L: Tensor | None = None  # what the objective's survey of the mini-batch said of each token

    @cached_property
    def is_trained_L(self) -> Tensor:
        return self.mask_L > 0

    @cached_property
    def _counts(self) -> tuple[Tensor, Tensor]:
        return self.scan.exclusive_and_whole(self.mask_L, "sum")

    @property
    def earlier_L(self) -> Tensor:
        """float64: the number of trained tokens of the sequence before this one."""
        return self._counts[0]

    @property
    def trained_L(self) -> Tensor:
        """float64: the number of trained tokens of the sequence."""
        return self._counts[1]

    @cached_property
    def _minima(self) -> tuple[Tensor, Tensor]:
        return self.scan.exclusive_and_whole(self.log_ratio_L, "min")

    @property
    def log_prefix_minimum_L(self) -> Tensor:
        """Least log-ratio of the sequence's earlier trained tokens, infinite for the first."""
        return self._minima[0]

    @property
    def log_minimum_L(self) -> Tensor:
        """Least log-ratio of the sequence's trained tokens."""
        return self._minima[1]

    @cached_property
    def prefix_minimum_L(self) -> Tensor:
        """m_t = min of the ratios of the sequence's earlier trained tokens, 1 for the first.

        arXiv:2601.22718, section 4. For ratios (1.5, .5, 2, 30, 1) it is (1, 1.5, .5, .5, .5).
        """
        return torch.where(self.log_prefix_minimum_L == torch.inf, 1.0, self.log_prefix_minimum_L.exp())

    @cached_property
    def prefix_log_ratio_L(self) -> Tensor:
        """float64: log of the product of the ratios up to and with this token."""
        return self.scan.inclusive(self.log_ratio_L, "sum")


@dataclass(frozen=True)
class ObjectiveTerms:
    """Per-token results of an objective, all without gradient; numbers are float64.

    The loss is a sum over tokens: `value_L` is each token's part of it, and d loss / d log pi_t = -coefficient_t.
    Masked tokens have numbers too, which mean nothing.
    """

    coefficients_L: Tensor
    value_L: Tensor
    weight_L: Tensor  # what multiplies the advantage, after clipping
    clipped_L: Tensor  # bool
    left_out_L: Tensor  # bool: the token has no part in the loss, but still counts in the denominator

    def without(self, left_out_L: Tensor) -> "ObjectiveTerms":
        """The terms with those tokens left out, whatever their numbers are."""
        coefficients, value, weight = (
            torch.where(left_out_L, 0.0, kept) for kept in (self.coefficients_L, self.value_L, self.weight_L)
        )
        return ObjectiveTerms(coefficients, value, weight, self.clipped_L & ~left_out_L, self.left_out_L | left_out_L)

    def scaled(self, factor_L: Tensor) -> "ObjectiveTerms":
        """The terms with every token's part of the loss times its factor; `weight_L` stays the objective's own."""
        return replace(self, coefficients_L=self.coefficients_L * factor_L, value_L=self.value_L * factor_L)


@dataclass(frozen=True)
class MiniBatch:
    """A rank's share of an optimizer mini-batch, with what it takes to look at all of it."""

    micro_batches: Sequence[PolicyTokens]
    ranks: Ranks  # all ranks that hold tokens of the mini-batch
    seed: int  # of this update: the same on all ranks


def policy_tokens(
    log_probs_L: Tensor,
    behavior_log_probs_L: Tensor,
    advantages_L: Tensor,
    mask_L: Tensor,
    scan: PrefixScan,
    ids_L: Tensor,
    surveyed_L: Tensor | None = None,
) -> PolicyTokens:
    """What an objective is asked about. Log-probs may be anything where the mask is 0. Where it is 1, an infinite
    difference counts as +-20 like every large one, and NaN stays NaN, down to the loss and the gradient."""
    log_probs_L = log_probs_L.detach()
    log_ratio = torch.where(mask_L > 0, log_difference(log_probs_L, behavior_log_probs_L), 0.0)
    return PolicyTokens(log_probs_L, log_ratio, advantages_L, mask_L, scan, ids_L, surveyed_L)


def log_difference(log_probs_L: Tensor, others_L: Tensor) -> Tensor:
    """log_probs - others, float64, clamped to +-20. In float32 a difference near 20 would be rounded by 1e-6, and the
    ratio with it."""
    return (log_probs_L.double() - others_L).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def summed_value(terms: ObjectiveTerms, token_weight_L: Tensor) -> Tensor:
    """The sum over local slots of weight x value. Scalar, float64, without gradient.

    `token_weight_L` is the mask for token-mean, mask / trained tokens of the sequence for sequence-mean.
    """
    return torch.where(token_weight_L > 0, terms.value_L.double() * token_weight_L, 0.0).sum()


def summed_loss(log_probs_L: Tensor, terms: ObjectiveTerms, token_weight_L: Tensor) -> Tensor:
    """`summed_value` as a scalar of the log-probs' type, with the gradient that the coefficients say.

    The caller divides by the mini-batch's number of tokens or sequences. Masked log-probs may be anything; if one of a
    trained token is NaN or infinite, the scalar is not finite.
    """
    counts = token_weight_L > 0
    factors = torch.where(counts, terms.coefficients_L * token_weight_L, 0.0).to(log_probs_L.dtype)
    slope = -(factors * torch.where(counts, log_probs_L, 0.0)).sum()
    return slope + (summed_value(terms, token_weight_L).to(slope.dtype) - slope).detach()


def position_bucket(tokens: PolicyTokens) -> Tensor:
    """int64 [L]: b for the trained tokens 2^b to 2^(b+1) - 1 of their sequence, counted from 1."""
    return torch.log2(tokens.earlier_L + 1.5).long()  # + 1/2: no rounding can put 2^b below b
