"""Corrections that work with every objective: engine mismatch, a proximal policy, a KL penalty."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minpro_megatron.config.loss import LossConfig
from minpro_megatron.objective.terms import ObjectiveTerms, log_difference


@dataclass(frozen=True)
class OtherLogProbs:
    """Log-probs of the same tokens from other sources than the current weights, float32 [L]; zeros if not used."""

    behavior_L: Tensor  # trainer, sampling weights
    rollout_L: Tensor  # server, sampling weights
    proximal_L: Tensor  # trainer, weights at the start of the global step
    reference_L: Tensor  # trainer, initial weights

    def denominator(self, settings: LossConfig) -> Tensor:
        """The log-probs in the denominator of the objective's ratio."""
        return self.proximal_L if settings.decoupled.enabled else self.behavior_L


def corrected(
    terms: ObjectiveTerms, log_probs_L: Tensor, others: OtherLogProbs, settings: LossConfig
) -> ObjectiveTerms:
    """The objective's terms with the corrections that `settings` enables; the same object if none is enabled.

    As in the ratio, infinite differences of a trained token's log-probs count as +-20 and NaN stays NaN. Log-probs of
    disabled corrections are not read. An excluded token has no part in the objective, whatever its values, but still
    has the KL penalty.
    """
    if settings.truncated_importance.enabled or settings.icepop.enabled:
        terms = _for_mismatch(terms, log_difference(others.behavior_L, others.rollout_L).exp(), settings)
    if settings.decoupled.enabled:
        weight = log_difference(others.proximal_L, others.behavior_L).exp()
        terms = terms.scaled(weight).without(weight > settings.decoupled.largest_weight)
    if settings.kl.enabled:
        value, slope = kl_estimate(log_probs_L.detach(), others.reference_L, settings.kl.estimator)
        terms = replace(
            terms,
            coefficients_L=terms.coefficients_L - settings.kl.coefficient * slope,
            value_L=terms.value_L + settings.kl.coefficient * value,
        )
    return terms


def kl_estimate(log_probs_L: Tensor, reference_L: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """(estimate of KL(policy || reference), its derivative by the policy's log-prob), per sampled token, in nats.

    With d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (J. Schulman, "Approximating KL
    divergence", 2020); d is clamped to +-20 in both.
    """
    difference = log_difference(log_probs_L, reference_L)
    if estimator == "k1":
        return difference, torch.ones_like(difference)
    if estimator == "k2":
        return difference**2 / 2, difference
    inverse = (-difference).exp()
    return inverse - 1 + difference, 1 - inverse


def _for_mismatch(terms: ObjectiveTerms, ratio_L: Tensor, settings: LossConfig) -> ObjectiveTerms:
    truncated, icepop = settings.truncated_importance, settings.icepop
    terms = terms.scaled(ratio_L.clamp(max=truncated.cap) if truncated.enabled else ratio_L)
    return terms.without((ratio_L < icepop.low) | (ratio_L > icepop.high)) if icepop.enabled else terms
