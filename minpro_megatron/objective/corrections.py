"""Corrections that work with every objective: engine mismatch, a proximal policy, a KL penalty."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minpro_megatron.config.loss import LossConfig, RejectionConfig
from minpro_megatron.objective.terms import MAX_LOG_RATIO, ObjectiveTerms, PolicyTokens, log_difference


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


@dataclass(frozen=True)
class Effects:
    """What the enabled corrections did to each token, for the statistics."""

    factor_L: Tensor | None = None  # product of the weights; None if no enabled correction weighs
    excluded: dict[str, Tensor] = field(default_factory=dict)  # bool [L] by the name of the setting
    whole_sequences: tuple[str, ...] = ()  # those of `excluded` that exclude the tokens of a sequence together


@dataclass(frozen=True)
class _Corrected:
    terms: ObjectiveTerms
    effects: Effects

    def scaled(self, factor_L: Tensor) -> "_Corrected":
        before = self.effects.factor_L
        product = factor_L if before is None else before * factor_L
        return _Corrected(self.terms.scaled(factor_L), replace(self.effects, factor_L=product))

    def without(self, name: str, excluded_L: Tensor, whole_sequences: bool = False) -> "_Corrected":
        effects = replace(
            self.effects,
            excluded=self.effects.excluded | {name: excluded_L},
            whole_sequences=(*self.effects.whole_sequences, name) if whole_sequences else self.effects.whole_sequences,
        )
        return _Corrected(self.terms.without(excluded_L), effects)

    def unless_unknown(self, statistic_L: Tensor) -> "_Corrected":
        """With NaN where the statistic, which decides about a token, is NaN: the loss must show it."""
        return _Corrected(self.terms.scaled(torch.where(statistic_L.isnan(), torch.nan, 1.0)), self.effects)


def corrected(
    terms: ObjectiveTerms, tokens: PolicyTokens, others: OtherLogProbs, settings: LossConfig
) -> tuple[ObjectiveTerms, Effects]:
    """(the objective's terms with the corrections that `settings` enables, what these did); the same terms if none is
    enabled.

    As in the ratio, infinite differences of a trained token's log-probs count as +-20 and NaN stays NaN. Log-probs of
    disabled corrections are not read. An excluded token has no part in the objective, whatever its values, but still
    has the KL penalty. Sums over a sequence are those of its trained tokens on all ranks.
    """
    found = _Corrected(terms, Effects())
    if settings.truncated_importance.enabled or settings.icepop.enabled:
        found = _for_mismatch_of_tokens(found, others, settings)
    if settings.sequence_importance.enabled:
        log_product = tokens.scan.whole(log_difference(others.behavior_L, others.rollout_L), "sum")
        ratio = log_product.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        found = found.scaled(ratio.clamp(max=settings.sequence_importance.cap))
    if settings.rejection.enabled:
        statistic = mismatch_statistic(tokens, others, settings.rejection)
        outside = _outside(statistic, settings.rejection)
        by_sequence = settings.rejection.statistic != "token"
        found = found.unless_unknown(statistic).without("rejection", outside, by_sequence)
    if settings.off_policy_masking.enabled:
        limit, away = settings.off_policy_masking.largest_mean_log_ratio, mean_log_ratio_away(tokens, others)
        assert limit is not None, "the settings refuse this"
        masked = (tokens.advantages_L < 0) & (away > limit)
        found = found.unless_unknown(away).without("off_policy_masking", masked, whole_sequences=True)
    if settings.decoupled.enabled:
        weight = log_difference(others.proximal_L, others.behavior_L).exp()
        found = found.scaled(weight).without("decoupled", weight > settings.decoupled.largest_weight)
    if settings.kl.enabled:
        value, slope = kl_estimate(tokens.log_probs_L, others.reference_L, settings.kl.estimator)
        penalized = replace(
            found.terms,
            coefficients_L=found.terms.coefficients_L - settings.kl.coefficient * slope,
            value_L=found.terms.value_L + settings.kl.coefficient * value,
        )
        return penalized, found.effects
    return found.terms, found.effects


def mismatch_statistic(tokens: PolicyTokens, others: OtherLogProbs, settings: RejectionConfig) -> Tensor:
    """float64 [L]: the statistic of KL(server || trainer) by which tokens, or their sequences, are rejected, in nats.

    The estimates of a token and the statistics are those of verl's rollout correction.
    """
    estimate, _ = kl_estimate(others.rollout_L, others.behavior_L, settings.estimator)
    if settings.statistic == "token":
        return estimate
    if settings.statistic == "max":
        return -tokens.scan.whole(-estimate, "min")
    total = tokens.scan.whole(estimate, "sum")
    return total if settings.statistic == "sum" else total / tokens.trained_L.clamp(min=1)


def mean_log_ratio_away(tokens: PolicyTokens, others: OtherLogProbs) -> Tensor:
    """float64 [L]: the mean of log(pi_server / pi) over the trained tokens of the sequence, in nats. Positive where the
    policy has lowered their probability. arXiv:2512.02556, section 3.1: pi_server is what the inference engine
    reported, so that both drift and engine mismatch count."""
    total = tokens.scan.whole(log_difference(others.rollout_L, tokens.log_probs_L), "sum")
    return total / tokens.trained_L.clamp(min=1)


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


def _for_mismatch_of_tokens(found: _Corrected, others: OtherLogProbs, settings: LossConfig) -> _Corrected:
    truncated, icepop = settings.truncated_importance, settings.icepop
    ratio_L = log_difference(others.behavior_L, others.rollout_L).exp()
    found = found.scaled(ratio_L.clamp(max=truncated.cap) if truncated.enabled else ratio_L)
    if not icepop.enabled:
        return found
    return found.without("icepop", (ratio_L < icepop.low) | (ratio_L > icepop.high))


def _outside(statistic_L: Tensor, settings: RejectionConfig) -> Tensor:
    outside = torch.zeros_like(statistic_L, dtype=torch.bool)
    if settings.low is not None:
        outside |= statistic_L < settings.low
    if settings.high is not None:
        outside |= statistic_L > settings.high
    return outside
