"""SAT: PPO's clip, contracted where the ratio of a token lies in the tail of the mini-batch."""

import torch
from torch import Tensor

from minpro_megatron.config.objective import SatConfig
from minpro_megatron.objective.across_ranks.ranking import boundary
from minpro_megatron.objective.formulas.pessimistic_clip import pessimistic_terms
from minpro_megatron.objective.survey import gather_selected, scatter_selected
from minpro_megatron.objective.terms import MiniBatch, ObjectiveTerms, PolicyTokens


def sat(tokens: PolicyTokens, settings: SatConfig) -> ObjectiveTerms:
    """SAT, arXiv:2607.18722: min(rho A, clip(rho, 1 - c_- clip_low, 1 + c_+ clip_high) A), no dual clip.

    c is the factor of `contractions` on the side on which rho is, c_+ for rho > 1 and c_- for rho < 1, and 1 on the
    other one. rho is the ratio of the token, or with ratio = sequence the geometric mean of the sequence's. For A = 1,
    ratios e^.1 for eight tokens, e^.12 and e^.15, q is .12 and the last token has c_+ = 1 / (1 + (.15 / .12)^2) =
    .3902: it is clipped at 1.0780, and by PPO at 1.2. Source: equations 3.1 to 3.6 of the authors' project page.
    """
    assert tokens.surveyed_L is not None, "sat needs its survey"
    log_ratio, factor = _log_ratio(tokens, settings), tokens.surveyed_L
    lower = 1 - settings.clip_low * torch.where(log_ratio < 0, factor, 1.0)
    upper = 1 + settings.clip_high * torch.where(log_ratio > 0, factor, 1.0)
    return pessimistic_terms(tokens, log_ratio.exp(), lower, upper, dual_L=None)


def contractions(mini_batch: MiniBatch, settings: SatConfig) -> list[Tensor]:
    """psi(u) = 1 / (1 + (u / q)^2) for each token with u = |log rho| > q, 1 for the others and for all if q = 0.

    q is the smallest u that at least the share `quantile` of the trained tokens does not exceed. The authors take it
    from each micro-batch; here it is that of the mini-batch, so that it does not depend on how rows are packed.
    """
    trained = [tokens.is_trained_L for tokens in mini_batch.micro_batches]
    sizes = gather_selected([_log_ratio(tokens, settings).abs() for tokens in mini_batch.micro_batches], trained)
    needed = settings.quantile * float(mini_batch.ranks.sum(sizes.new_full((), len(sizes))))
    edge = boundary(sizes, lambda count, total, edge: count < needed, mini_batch.ranks)
    if edge is None or edge.value == 0:  # without trained tokens, or where most of them have a ratio of 1
        factors = torch.ones_like(sizes)
    else:
        factors = torch.where(sizes > edge.value, 1 / (1 + (sizes / edge.value) ** 2), 1.0)
    return scatter_selected(factors, trained, mini_batch)


def _log_ratio(tokens: PolicyTokens, settings: SatConfig) -> Tensor:
    return tokens.log_ratio_L if settings.ratio == "token" else tokens.sequence_mean_log_ratio_L
