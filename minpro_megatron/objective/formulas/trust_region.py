"""What the objectives with a trust region share: estimates of the divergence of the policy from the policy that
sampled, and the loss of the tokens that are kept.

Both estimates use the sampled token alone: they compare the distribution over "this token" and "any other token", and
are lower bounds of the divergence over the whole vocabulary (arXiv:2602.04879, section 4.4 and appendix B). They need
no log-probs but those that every objective has.
"""

from collections.abc import Callable

from torch import Tensor

from minpro_megatron.objective.formulas.clipped_weight import weighted_terms
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens

_SMALL = 1e-8  # of two probabilities of any other token: their quotient stays finite where both are rounded to 0


def binary_total_variation(tokens: PolicyTokens) -> Tensor:
    """|pi_t - mu_t|, float64 [L]: arXiv:2602.04879, equation 13. A log-prob above 0, from rounding, counts as 0."""
    new, old = (log_probs.double().clamp(max=0).exp() for log_probs in (tokens.log_probs_L, tokens.old_log_probs_L))
    return (new - old).abs()


def binary_kl(tokens: PolicyTokens) -> Tensor:
    """KL(mu || pi) = mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)) in nats, float64 [L]: arXiv:2602.04879,
    equation 14. 1e-8 is added to 1 - mu and to 1 - pi in the quotient, as in the code of its authors."""
    new, old = (log_probs.double().clamp(max=0) for log_probs in (tokens.log_probs_L, tokens.old_log_probs_L))
    others, old_others = -new.expm1(), -old.expm1()
    return -old.exp() * tokens.log_ratio_L + old_others * ((old_others + _SMALL) / (others + _SMALL)).log()


DIVERGENCES: dict[str, Callable[[PolicyTokens], Tensor]] = {
    "total_variation": binary_total_variation,
    "kl": binary_kl,
}


def ratio_terms(tokens: PolicyTokens, largest_ratio: float | None) -> ObjectiveTerms:
    """The loss -sg(min(rho, largest_ratio)) A log pi of every token; None: the ratio is not limited.

    Without a limit its gradient is that of -rho A, the surrogate of the papers.
    """
    ratio = tokens.log_ratio_L.exp()
    kept = ratio if largest_ratio is None else ratio.clamp(max=largest_ratio)
    return weighted_terms(tokens, kept, kept != ratio)
