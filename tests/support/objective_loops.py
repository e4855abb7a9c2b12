"""The objectives and what can be switched on around them as float64 loops, written from the papers.

They share nothing with the code they check but the definitions: plain Python numbers, a token at a time. Where an
objective is differentiated through a clip, its surrogate is written down and torch's autograd differentiates it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minpro_megatron.config.loss import LossConfig, RejectionConfig
from minpro_megatron.config.objective import (
    Aggregation,
    CppoConfig,
    CtpoConfig,
    CtpoGeomeanConfig,
    CtpoSection,
    DppoConfig,
    GrpoConfig,
    GspoConfig,
    M2poConfig,
    M2poWinsorizedConfig,
    PnpoConfig,
    PrefixFilterConfig,
    SapoConfig,
    SatConfig,
    TrmConfig,
    VespoConfig,
)
from tests.support.ragged_tokens import Tokens, prefix_minima

Surrogate = Callable[[torch.Tensor], torch.Tensor]  # log-ratios of a sequence's trained tokens -> each one's objective


@dataclass
class Expected:
    """The loss is the sum of the trained tokens' values; d loss / d log pi_t = -coefficient_t. Lists [tokens]."""

    coefficients: list[float]
    values: list[float]


# ---- objectives of the form -stop_gradient(weight) * A * log pi


def minpro_weights(tokens: Tokens) -> list[float]:
    """arXiv:2601.22718: m_t rho_t, before the clip."""
    return [m * rho for m, rho in zip(prefix_minima(tokens), tokens.ratios, strict=True)]


def prefix_ratio_weights(tokens: Tokens) -> list[float]:
    """arXiv:2601.22718, the first failed attempt: rho_1 ... rho_t, before the clip."""
    return [math.exp(min(log_product, 700.0)) for log_product in log_products(tokens)]  # a float64 holds exp(709)


def weighted(tokens: Tokens, weights: Sequence[float], clip_low: float, clip_high: float) -> Expected:
    """arXiv:2506.13585 with the ratios as weights."""
    coefficients, values = [], []
    for weight, advantage, log_prob in zip(weights, tokens.advantages, tokens.log_probs, strict=True):
        clipped = clip(weight, 1 - clip_low, 1 + clip_high)
        coefficients.append(clipped * float(advantage))
        values.append(-clipped * float(advantage) * float(log_prob))
    return Expected(coefficients, values)


def clip(value: float, low: float, high: float) -> float:
    return low if value < low else high if value > high else value


def log_products(tokens: Tokens) -> list[float]:
    """log(rho_1 ... rho_t) over the trained tokens of the sequence up to t; 0 for masked tokens."""
    logs, result = tokens.log_ratios, [0.0] * len(tokens.mask)
    for trained in tokens.trained_of_sequences():
        of_sequence = [logs[place] for place in trained]
        for count, place in enumerate(trained, start=1):
            result[place] = math.fsum(of_sequence[:count])
    return result


# ---- objectives with PPO's clip


def grpo(tokens: Tokens, settings: GrpoConfig) -> Expected:
    """arXiv:2402.03300 with the bounds of 2503.14476, equation 10, and the dual clip of 1912.09729, equation 5."""
    low, high = 1 - settings.clip_low, 1 + settings.clip_high

    def surrogate(place: list[int]) -> Surrogate:
        return lambda log_ratios: ppo(log_ratios.exp(), advantages(tokens, place), low, high, settings.dual_clip)

    return differentiated(tokens, surrogate)


def gspo(tokens: Tokens, settings: GspoConfig) -> Expected:
    """arXiv:2507.18071, equations 5 to 7. A sequence's objective stands at each of its n tokens, and sequence-mean
    divides their sum by n: of the gradient of one such objective, a token has n times its share to give."""
    low, high = 1 - settings.clip_low, 1 + settings.clip_high

    def surrogate(place: list[int]) -> Surrogate:
        return lambda log_ratios: ppo(
            (log_ratios.sum() / len(place)).exp().expand(len(place)), advantages(tokens, place), low, high
        )

    return differentiated(tokens, surrogate)


def ctpo(tokens: Tokens, settings: CtpoConfig) -> Expected:
    """arXiv:2605.07331: PPO's clip on stop_gradient(rho_1 ... rho_t-1) rho_t, bounds growing with sqrt(t)."""
    return clipped_by_position(tokens, log_products(tokens), settings)


def ctpo_geomean(tokens: Tokens, settings: CtpoGeomeanConfig) -> Expected:
    """The code of arXiv:2605.07331's authors: the geometric mean up to t in place of the product."""
    return clipped_by_position(tokens, log_prefix_means(tokens), settings)


def log_prefix_means(tokens: Tokens) -> list[float]:
    """log of the geometric mean of rho_1 ... rho_t; 0 for masked tokens."""
    logs = log_products(tokens)
    for place in tokens.trained_of_sequences():
        for t, one in enumerate(place, start=1):
            logs[one] /= t
    return logs


def clipped_by_position(tokens: Tokens, logs: Sequence[float], settings: CtpoSection) -> Expected:
    def surrogate(place: list[int]) -> Surrogate:
        scale = torch.arange(1, len(place) + 1, dtype=torch.float64) ** settings.position_exponent
        limit = 700.0 if settings.log_clamp is None else settings.log_clamp
        clamped = torch.tensor([clip(logs[one], -limit, limit) for one in place], dtype=torch.float64)

        def objective(log_ratios: torch.Tensor) -> torch.Tensor:
            this_factor = (log_ratios - log_ratios.detach()).exp()  # 1, with the gradient of rho_t / rho_t
            return ppo(
                clamped.exp() * this_factor,
                advantages(tokens, place),
                (-settings.log_clip_low * scale).exp(),
                (settings.log_clip_high * scale).exp(),
                (settings.log_dual_clip * scale).exp(),
            )

        return objective

    return differentiated(tokens, surrogate)


def m2po_winsorized(tokens: Tokens, settings: M2poWinsorizedConfig) -> Expected:
    """The code of arXiv:2510.01161's authors: one clip for the mini-batch, no dual clip."""
    tau = winsorizing_log_ratio(tokens, settings.second_moment)
    bound = torch.tensor(math.inf if tau is None else tau, dtype=torch.float64)
    # torch's exponential: the token that tau is taken from lies on the bound, exactly
    low, high = min(float((-bound).exp()), 1 - settings.clip_low), max(float(bound.exp()), 1 + settings.clip_high)

    def surrogate(place: list[int]) -> Surrogate:
        return lambda log_ratios: ppo(log_ratios.exp(), advantages(tokens, place), low, high)

    return differentiated(tokens, surrogate)


def sat(tokens: Tokens, settings: SatConfig) -> Expected:
    """arXiv:2607.18722, equations 3.1 to 3.6 of the authors' project page, q over the mini-batch."""
    logs, factors = sat_log_ratios(tokens, settings), sat_contractions(tokens, settings)

    def surrogate(place: list[int]) -> Surrogate:
        low = [1 - settings.clip_low * (factors[one] if logs[one] < 0 else 1.0) for one in place]
        high = [1 + settings.clip_high * (factors[one] if logs[one] > 0 else 1.0) for one in place]
        bounds = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)

        def objective(log_ratios: torch.Tensor) -> torch.Tensor:
            whole = (log_ratios.sum() / len(place)).expand(len(place))
            log_ratio = whole if settings.ratio == "sequence" else log_ratios
            return ppo(log_ratio.exp(), advantages(tokens, place), *bounds)

        return objective

    return differentiated(tokens, surrogate)


def sat_log_ratios(tokens: Tokens, settings: SatConfig) -> list[float]:
    """Of each token, or the mean of its sequence."""
    logs = list(tokens.log_ratios)
    for place in tokens.trained_of_sequences() if settings.ratio == "sequence" else ():
        mean = math.fsum(tokens.log_ratios[one] for one in place) / len(place)
        for one in place:
            logs[one] = mean
    return logs


def sat_contractions(tokens: Tokens, settings: SatConfig) -> list[float]:
    """c of each token on the side of its ratio: psi(|d|; q) where |d| > q > 0, else 1."""
    sizes = [abs(log) for log in sat_log_ratios(tokens, settings)]
    trained = sorted(sizes[place] for place in np.flatnonzero(tokens.trained))
    q = trained[math.ceil(settings.quantile * len(trained)) - 1]
    return [1 / (1 + (size / q) ** 2) if size > q > 0 else 1.0 for size in sizes]


def ppo(
    ratio: torch.Tensor,
    advantage: torch.Tensor,
    low: float | torch.Tensor,
    high: float | torch.Tensor,
    dual: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """min(ratio A, clip(ratio) A); with a dual clip, for A < 0, max(that, dual A). Spelled out, because on a bound the
    token still has its gradient: torch.minimum and torch.clamp would halve it."""
    bounded = torch.where(ratio < low, low, torch.where(ratio > high, high, ratio))
    objective = torch.where(bounded * advantage < ratio * advantage, bounded * advantage, ratio * advantage)
    if dual is None:
        return objective
    return torch.where((advantage < 0) & (objective < dual * advantage), dual * advantage, objective)


def advantages(tokens: Tokens, place: list[int]) -> torch.Tensor:
    return torch.tensor(tokens.advantages[place], dtype=torch.float64)


def differentiated(tokens: Tokens, surrogate: Callable[[list[int]], Surrogate]) -> Expected:
    """Values and gradients of the sum of a sequence's objectives, at the log-ratios kept within +-20."""
    coefficients, values = np.zeros(len(tokens.mask)), np.zeros(len(tokens.mask))
    logs = tokens.log_ratios
    for place in tokens.trained_of_sequences():
        log_ratios = torch.tensor([logs[one] for one in place], dtype=torch.float64, requires_grad=True)
        objective = surrogate(place)(log_ratios)
        (gradient,) = torch.autograd.grad(objective.sum(), log_ratios)
        values[place], coefficients[place] = -objective.detach().numpy(), gradient.numpy()
    return Expected(coefficients.tolist(), values.tolist())


# ---- objectives that keep the tokens inside a trust region


def sampled_divergence(tokens: Tokens, place: int, kind: str) -> float:
    """arXiv:2602.04879, equations 13 and 14: the two-way distribution (this token, any other)."""
    new, old = (min(1.0, math.exp(float(log[place]))) for log in (tokens.log_probs, tokens.behavior))
    if kind == "total_variation":
        return abs(old - new)
    others = [-math.expm1(min(0.0, float(log[place]))) for log in (tokens.behavior, tokens.log_probs)]
    return -old * tokens.log_ratios[place] + others[0] * math.log((others[0] + 1e-8) / (others[1] + 1e-8))


def ratios_of(tokens: Tokens, kept: Callable[[int], bool], largest: float | None) -> Expected:
    """min(rho, largest) as the weight of the kept tokens; arXiv:2602.04879, equation 23."""
    result = Expected([], [])
    for place, rho in enumerate(tokens.ratios):
        weight = (min(rho, largest) if largest is not None else rho) if kept(place) else 0.0
        result.coefficients.append(weight * float(tokens.advantages[place]))
        result.values.append(-weight * float(tokens.advantages[place]) * float(tokens.log_probs[place]))
    return result


def dppo(tokens: Tokens, settings: DppoConfig) -> Expected:
    """arXiv:2602.04879, equation 12, with a threshold for each side."""

    def kept(place: int) -> bool:
        if not tokens.mask[place]:
            return False
        advantage, rho = tokens.advantages[place], tokens.ratios[place]
        divergence = sampled_divergence(tokens, place, settings.divergence)
        if advantage > 0 and rho > 1:
            return divergence <= settings.threshold_high
        return not (advantage < 0 and rho < 1 and divergence > settings.threshold_low)

    return ratios_of(tokens, kept, settings.largest_ratio)


def cppo(tokens: Tokens, settings: CppoConfig) -> Expected:
    """arXiv:2606.10968, Algorithm 1, a token of a response at a time."""
    mask = [False] * len(tokens.mask)
    for place in tokens.trained_of_sequences():
        spent = allowed = 0.0
        last = (len(place) if settings.horizon is None else settings.horizon) - 1
        for t, one in enumerate(place, start=1):
            progress = 0.0 if t == 1 else 1.0 if t > last else (t - 1) / last
            weight = 1 - (1 - settings.smallest_weight) * progress
            weighted_divergence = weight * sampled_divergence(tokens, one, settings.divergence)
            limit = min(settings.threshold, settings.threshold + settings.budget * allowed - spent)
            toward = float(tokens.advantages[one]) * (tokens.ratios[one] - 1) <= 0
            mask[one] = toward or weighted_divergence <= limit
            spent, allowed = spent + weighted_divergence, allowed + weight
    return ratios_of(tokens, mask.__getitem__, settings.largest_ratio)


def trm(tokens: Tokens, settings: TrmConfig) -> Expected:
    """arXiv:2512.23075: a mask of 0 or 1 for a whole response, by its largest or its mean divergence."""
    mask = [False] * len(tokens.mask)
    for place in tokens.trained_of_sequences():
        found = [sampled_divergence(tokens, one, settings.divergence) for one in place]
        kept = settings.max_divergence is None or max(found) <= settings.max_divergence
        if settings.mean_divergence is not None:
            kept = kept and math.fsum(found) / len(found) <= settings.mean_divergence
        for one in place:
            mask[one] = kept
    return ratios_of(tokens, mask.__getitem__, settings.largest_ratio)


# ---- objectives with a smooth weight


def sapo(tokens: Tokens, settings: SapoConfig) -> Expected:
    """arXiv:2511.20347, equations 5 and 6: the gate, differentiated by autograd."""

    def surrogate(place: list[int]) -> Surrogate:
        advantage = advantages(tokens, place)
        tau = torch.tensor(
            [settings.temperature_positive if one > 0 else settings.temperature_negative for one in advantage.tolist()],
            dtype=torch.float64,
        )
        return lambda log_ratios: 4 / tau / (1 + (-tau * (log_ratios.exp() - 1)).exp()) * advantage

    return differentiated(tokens, surrogate)


def vespo_weights(tokens: Tokens, settings: VespoConfig) -> list[float]:
    """arXiv:2602.10693: phi(W) = W^c1 exp(c2 (1 - W)) of a response's product of ratios W."""
    weights = [1.0] * len(tokens.mask)
    for place in tokens.trained_of_sequences():
        product = math.exp(clip(math.fsum(tokens.log_ratios[one] for one in place), -20.0, 20.0))
        for one in place:
            if tokens.advantages[one] >= 0:
                power, decay = settings.power_positive, settings.decay_positive
            else:
                power, decay = settings.power_negative, settings.decay_negative
            weights[one] = product**power * math.exp(decay * (1 - product))
    return weights


def p3o(tokens: Tokens) -> Expected:
    """arXiv:2605.12380, equations 11 and 12; the KL is differentiated by autograd."""
    place = [one for of in tokens.trained_of_sequences() for one in of]
    ratios = [tokens.ratios[one] for one in place]
    share = math.fsum(ratios) ** 2 / (len(ratios) * math.fsum(ratio**2 for ratio in ratios))
    weights = [min(ratio, share) for ratio in tokens.ratios]
    plain = weighted_as_they_are(tokens, weights)
    d = torch.tensor(tokens.log_ratios, dtype=torch.float64, requires_grad=True)
    divergence = (1 - share) * (torch.expm1(-d) + d)
    (slope,) = torch.autograd.grad(divergence.sum(), d)
    return Expected(
        (np.array(plain.coefficients) - slope.numpy()).tolist(),
        (np.array(plain.values) + divergence.detach().numpy()).tolist(),
    )


def pnpo(tokens: Tokens, settings: PnpoConfig) -> Expected:
    """arXiv:2608.01418: (rho_1 ... rho_t)^(1/t), and rejection by it."""
    low = 0.0 if settings.smallest_weight is None else settings.smallest_weight
    high = math.inf if settings.largest_weight is None else settings.largest_weight
    weights = [math.exp(log) for log in log_prefix_means(tokens)]
    return weighted_as_they_are(tokens, [one if low <= one <= high else 0.0 for one in weights])


def weighted_as_they_are(tokens: Tokens, weights: Sequence[float]) -> Expected:
    coefficients = [w * float(a) for w, a in zip(weights, tokens.advantages, strict=True)]
    return Expected(coefficients, [-c * float(log) for c, log in zip(coefficients, tokens.log_probs, strict=True)])


# ---- what M2PO and the prefix filter choose from a whole mini-batch


def harmful_tokens(tokens: Tokens) -> list[int]:
    """Trained tokens with A > 0 and rho > 1, or A < 0 and rho < 1."""
    found = []
    for place, (advantage, log_ratio) in enumerate(zip(tokens.advantages, tokens.log_ratios, strict=True)):
        pushes_further = (advantage > 0 and log_ratio > 0) or (advantage < 0 and log_ratio < 0)
        if tokens.mask[place] and pushes_further:
            found.append(place)
    return found


def m2po_left_out(tokens: Tokens, budget: float) -> set[int]:
    """arXiv:2510.01161, Algorithm 1: one harmful token after the other is masked, the largest square first, until the
    mean square of the others is at most the budget. Of equal squares the last token goes first."""
    logs, left_out = tokens.log_ratios, set()
    remaining = sorted(harmful_tokens(tokens), key=lambda place: (logs[place] ** 2, place))
    while remaining and math.fsum(logs[place] ** 2 for place in remaining) / len(remaining) > budget:
        left_out.add(remaining.pop())
    return left_out


def m2po(tokens: Tokens, settings: M2poConfig) -> Expected:
    left_out = m2po_left_out(tokens, settings.second_moment)
    kept = [0.0 if place in left_out else rho for place, rho in enumerate(tokens.ratios)]
    coefficients = [rho * float(advantage) for rho, advantage in zip(kept, tokens.advantages, strict=True)]
    return Expected(coefficients, [-c for c in coefficients])


def winsorizing_log_ratio(tokens: Tokens, budget: float) -> float | None:
    """tau of the code of arXiv:2510.01161's authors; None: no clipping."""
    logs = tokens.log_ratios
    squares = sorted(logs[place] ** 2 for place in harmful_tokens(tokens))
    count = len(squares)
    if not count or math.fsum(squares) / count <= budget:
        return None
    for k, square in enumerate(squares):
        if square * (count - k - 1) + math.fsum(squares[: k + 1]) >= count * budget:
            return 0.0 if k == 0 else math.sqrt(squares[k - 1])
    raise AssertionError("the last k gives the plain sum, which is beyond the budget")


def prefix_filter_left_out(tokens: Tokens, share: float) -> set[int]:
    """arXiv:2601.22718, the second failed attempt: products of ratios strictly below their quantile."""
    trained = [place for of in tokens.trained_of_sequences() for place in of]
    logs = log_products(tokens)
    products = np.array([math.exp(logs[place]) for place in trained])
    limit = np.quantile(products, share)
    return {place for place, product in zip(trained, products, strict=True) if product < limit}


def prefix_filter(tokens: Tokens, settings: PrefixFilterConfig) -> Expected:
    kept = weighted(tokens, tokens.ratios, settings.clip_low, settings.clip_high)
    for place in prefix_filter_left_out(tokens, settings.quantile):
        kept.coefficients[place] = kept.values[place] = 0.0
    return kept


# ---- the objectives by name, and the loss of a mini-batch

# every objective but shuffled_minpro, which draws random numbers: (tokens of a mini-batch, settings) -> its terms
LOOPS: dict[str, Callable[[Tokens, Any], Expected]] = {
    "minpro": lambda tokens, s: weighted(tokens, minpro_weights(tokens), s.clip_low, s.clip_high),
    "cispo": lambda tokens, s: weighted(tokens, tokens.ratios, s.clip_low, s.clip_high),
    "grpo": grpo,
    "gspo": gspo,
    "m2po": m2po,
    "m2po_winsorized": m2po_winsorized,
    "ctpo": ctpo,
    "ctpo_geomean": ctpo_geomean,
    "dppo": dppo,
    "cppo": cppo,
    "trm": trm,
    "sapo": sapo,
    "vespo": lambda tokens, s: weighted_as_they_are(tokens, vespo_weights(tokens, s)),
    "pnpo": pnpo,
    "p3o": lambda tokens, s: p3o(tokens),
    "sat": sat,
    "prefix_ratio": lambda tokens, s: weighted(tokens, prefix_ratio_weights(tokens), s.clip_low, s.clip_high),
    "prefix_filter": prefix_filter,
    "scaled_cispo": lambda tokens, s: weighted(tokens, tokens.ratios, s.clip_low, s.clip_high),
}


def expected_loss(expected: Expected, tokens: Tokens, aggregation: Aggregation) -> tuple[float, np.ndarray]:
    """(the loss, its gradient by every token's log-prob): arXiv:2503.14476, equation 8, and 2507.18071, equation 5."""
    loss, gradient = 0.0, np.zeros(len(tokens.mask))
    sequences = tokens.trained_of_sequences()
    for trained in sequences:
        count = tokens.trained.sum() if aggregation == "token_mean" else len(trained) * len(sequences)
        loss += sum(expected.values[place] for place in trained) / count
        for place in trained:
            gradient[place] = -expected.coefficients[place] / count
    return loss, gradient


# ---- what can be switched on around an objective


@dataclass(frozen=True)
class OtherNumbers:
    """Log-probs of the same tokens from elsewhere, arrays [tokens]; the behavior's are those of `Tokens`."""

    rollout: np.ndarray
    proximal: np.ndarray
    reference: np.ndarray


def corrected(expected: Expected, tokens: Tokens, others: OtherNumbers, loss: LossConfig) -> Expected:
    """`expected` is the objective's, with its ratios against `others.proximal` where `loss` decouples them."""
    result = Expected([], [])
    estimates, slopes = kl(tokens.log_probs, others.reference, loss.kl.estimator)
    of_sequences = sequence_factors(tokens, others, loss)
    for place, behavior in enumerate(tokens.behavior):
        factor = of_sequences[place] * token_factor(
            ratio=between(behavior, others.rollout[place]),
            proximal_ratio=between(others.proximal[place], behavior),
            loss=loss,
        )
        coefficient, value = expected.coefficients[place] * factor, expected.values[place] * factor
        if loss.kl.enabled:
            coefficient -= loss.kl.coefficient * slopes[place]
            value += loss.kl.coefficient * estimates[place]
        result.coefficients.append(coefficient)
        result.values.append(value)
    return result


def token_factor(ratio: float, proximal_ratio: float, loss: LossConfig) -> float:
    """Truncated importance; IcePop (arXiv:2510.18855: the ratio inside the bounds, else 0); decoupled PPO
    (arXiv:2505.24298: pi_proximal / pi_behavior), without tokens beyond its largest weight."""
    factor = 1.0
    if loss.truncated_importance.enabled:
        factor *= min(ratio, loss.truncated_importance.cap)
    elif loss.icepop.enabled:
        factor *= ratio
    if loss.icepop.enabled and not loss.icepop.low <= ratio <= loss.icepop.high:
        factor = 0.0
    if loss.decoupled.enabled:
        factor *= proximal_ratio if proximal_ratio <= loss.decoupled.largest_weight else 0.0
    return factor


def sequence_factors(tokens: Tokens, others: OtherNumbers, loss: LossConfig) -> list[float]:
    """The weight of a token's sequence, min(product of pi_trainer / pi_server, cap), and 0 where it is rejected (verl's
    rollout correction) or masked as off-policy (arXiv:2512.02556, section 3.1). 1 for masked tokens."""
    factors = [1.0] * len(tokens.mask)
    for trained in tokens.trained_of_sequences():
        mismatch = [clip(float(tokens.behavior[place]) - float(others.rollout[place]), -20, 20) for place in trained]
        away = [clip(float(others.rollout[place]) - float(tokens.log_probs[place]), -20, 20) for place in trained]
        estimates = [{"k1": -d, "k2": d * d / 2, "k3": math.expm1(d) - d}[loss.rejection.estimator] for d in mismatch]
        for place, estimate in zip(trained, estimates, strict=True):
            if loss.sequence_importance.enabled:
                product = math.exp(clip(math.fsum(mismatch), -20, 20))
                factors[place] *= min(product, loss.sequence_importance.cap)
            if loss.rejection.enabled and is_rejected(estimate, estimates, loss.rejection):
                factors[place] = 0.0
            limit = loss.off_policy_masking.largest_mean_log_ratio
            if loss.off_policy_masking.enabled and limit is not None and tokens.advantages[place] < 0:
                factors[place] *= math.fsum(away) / len(away) <= limit
    return factors


def is_rejected(estimate: float, estimates: list[float], settings: RejectionConfig) -> bool:
    statistic = {
        "token": estimate,
        "sum": math.fsum(estimates),
        "mean": math.fsum(estimates) / len(estimates),
        "max": max(estimates),
    }[settings.statistic]
    too_low = settings.low is not None and statistic < settings.low
    return too_low or (settings.high is not None and statistic > settings.high)


def between(log_numerator: float, log_denominator: float) -> float:
    return math.exp(clip(float(log_numerator) - float(log_denominator), -20.0, 20.0))


def kl(log_probs: np.ndarray, reference: np.ndarray, estimator: str) -> tuple[list[float], list[float]]:
    """(each token's estimate, its derivative by log pi): Schulman's k1 = d, k2 = d^2 / 2, k3 = r - 1 - log r with
    d = log(pi / pi_ref) = -log r, kept within +-20 (arXiv:2402.03300, equation 4, has k3)."""
    kept = [clip(float(new) - float(old), -20.0, 20.0) for new, old in zip(log_probs, reference, strict=True)]
    d = torch.tensor(kept, dtype=torch.float64, requires_grad=True)
    estimate = {"k1": d * 1, "k2": d * d / 2, "k3": torch.expm1(-d) + d}[estimator]
    (slope,) = torch.autograd.grad(estimate.sum(), d)
    return estimate.tolist(), slope.tolist()
