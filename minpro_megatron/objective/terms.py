"""The inputs and results of every objective, and the loss that is computed from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from minpro_megatron.objective.across_ranks.ranking import Ranks
from minpro_megatron.objective.across_ranks.scan import PrefixScan

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8 stays finite in float32, and so do products of two


@dataclass(frozen=True)
class PolicyTokens:
    """An objective's inputs for the local slots, all without gradient. L: local slots."""

    log_probs_L: Tensor  # float32, under the current policy
    old_log_probs_L: Tensor  # under the policy of the ratio's denominator; any value where masked
    log_ratio_L: Tensor  # float64: delta_t = log pi - log pi_old, clamped to +-20, 0 where masked
    advantages_L: Tensor
    mask_L: Tensor  # 1 for trained response tokens
    scan: PrefixScan
    ids_L: Tensor  # int64: the token's index among the mini-batch's response tokens, -1 where there is no token
    surveyed_L: Tensor | None = None  # result of the objective's survey of the mini-batch, per token

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
        """The smallest log-ratio of the sequence's earlier trained tokens, infinity for the first."""
        return self._minima[0]

    @property
    def log_minimum_L(self) -> Tensor:
        """The smallest log-ratio of the sequence's trained tokens."""
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

    @property
    def prefix_mean_log_ratio_L(self) -> Tensor:
        """float64: log of the geometric mean of the ratios up to and with this token."""
        return self.prefix_log_ratio_L / (self.earlier_L + 1)

    @cached_property
    def sequence_mean_log_ratio_L(self) -> Tensor:
        """float64: log of the geometric mean of the ratios of the sequence's trained tokens."""
        return self.scan.whole(self.log_ratio_L, "sum") / self.scan.whole(self.mask_L, "sum").clamp(min=1)


@dataclass(frozen=True)
class ObjectiveTerms:
    """Per-token results of an objective, all without gradient; numbers are float64.

    The loss is a sum over tokens: `value_L` is each token's part of it, and d loss / d log pi_t = -coefficient_t.
    The values of masked tokens have no meaning.
    """

    coefficients_L: Tensor
    value_L: Tensor
    weight_L: Tensor  # the factor of the advantage, after clipping
    clipped_L: Tensor  # bool
    excluded_L: Tensor  # bool: the token has no part in the loss, but still counts in the denominator

    def without(self, excluded_L: Tensor) -> "ObjectiveTerms":
        """The terms with those tokens excluded, whatever their values are."""
        coefficients, value, weight = (
            torch.where(excluded_L, 0.0, kept) for kept in (self.coefficients_L, self.value_L, self.weight_L)
        )
        return ObjectiveTerms(coefficients, value, weight, self.clipped_L & ~excluded_L, self.excluded_L | excluded_L)

    def scaled(self, factor_L: Tensor) -> "ObjectiveTerms":
        """The terms with every token's part of the loss multiplied by its factor; `weight_L` does not change."""
        return replace(self, coefficients_L=self.coefficients_L * factor_L, value_L=self.value_L * factor_L)


@dataclass(frozen=True)
class MiniBatch:
    """A rank's share of an optimizer mini-batch, with the collectives for statistics of the whole mini-batch."""

    micro_batches: Sequence[PolicyTokens]
    ranks: Ranks  # all ranks that have tokens of the mini-batch
    seed: int  # for this update: the same on all ranks


def policy_tokens(
    log_probs_L: Tensor,
    behavior_log_probs_L: Tensor,
    advantages_L: Tensor,
    mask_L: Tensor,
    scan: PrefixScan,
    ids_L: Tensor,
    surveyed_L: Tensor | None = None,
) -> PolicyTokens:
    """The inputs of an objective. Log-probs may have any value where the mask is 0. Where it is 1, an infinite
    difference counts as +-20 like every large one, and NaN stays NaN in the loss and the gradient."""
    log_probs_L = log_probs_L.detach()
    log_ratio = torch.where(mask_L > 0, log_difference(log_probs_L, behavior_log_probs_L), 0.0)
    old_log_probs_L = behavior_log_probs_L.detach()
    return PolicyTokens(log_probs_L, old_log_probs_L, log_ratio, advantages_L, mask_L, scan, ids_L, surveyed_L)


def log_difference(log_probs_L: Tensor, others_L: Tensor) -> Tensor:
    """log_probs - others, float64, clamped to +-20. In float32 a difference near 20, and with it the ratio, would
    have a rounding error of 1e-6."""
    return (log_probs_L.double() - others_L).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def summed_value(terms: ObjectiveTerms, token_weight_L: Tensor) -> Tensor:
    """The sum over local slots of weight x value. Scalar, float64, without gradient.

    `token_weight_L` is the mask for token-mean, mask / trained tokens of the sequence for sequence-mean.
    """
    return torch.where(token_weight_L > 0, terms.value_L.double() * token_weight_L, 0.0).sum()


def summed_loss(log_probs_L: Tensor, terms: ObjectiveTerms, token_weight_L: Tensor) -> Tensor:
    """`summed_value` as a scalar of the log-probs' dtype, with the gradient that the coefficients give.

    The caller divides by the mini-batch's number of tokens or sequences. Masked log-probs may have any value; if the
    log-prob of a trained token is NaN or infinite, the scalar is not finite.
    """
    counts = token_weight_L > 0
    factors = torch.where(counts, terms.coefficients_L * token_weight_L, 0.0).to(log_probs_L.dtype)
    slope = -(factors * torch.where(counts, log_probs_L, 0.0)).sum()
    return slope + (summed_value(terms, token_weight_L).to(slope.dtype) - slope).detach()


def position_bucket(tokens: PolicyTokens) -> Tensor:
    """int64 [L]: b for the trained tokens 2^b to 2^(b+1) - 1 of their sequence, counted from 1."""
    return torch.log2(tokens.earlier_L + 1.5).long()  # + 1/2: rounding cannot put 2^b into bucket b - 1
