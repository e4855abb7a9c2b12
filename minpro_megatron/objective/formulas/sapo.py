"""SAPO: a smooth gate of the importance ratio in place of a clip."""

import torch

from minpro_megatron.config.objective import SapoConfig
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens


def sapo(tokens: PolicyTokens, settings: SapoConfig) -> ObjectiveTerms:
    """SAPO, arXiv:2511.20347: objective f(rho) A with f(rho) = (4 / tau) sigmoid(tau (rho - 1)).

    tau is temperature_positive for A > 0 and temperature_negative otherwise. The gradient is that of log pi times
    f'(rho) rho A, where f'(rho) = 4 p (1 - p) with p = sigmoid(tau (rho - 1)) is 1 at rho = 1 and falls on both sides:
    for tau = 1, A = 1 and rho = (.5, 1, 2, 5) the weights are (.4700, 1, 1.5729, .3533).
    """
    ratio = tokens.log_ratio_L.exp()
    temperature = torch.full_like(ratio, settings.temperature_negative)
    temperature = temperature.masked_fill(tokens.advantages_L > 0, settings.temperature_positive)
    gate, rest = (torch.sigmoid(sign * temperature * (ratio - 1)) for sign in (1, -1))  # rest = 1 - gate, not rounded
    weight = 4 * gate * rest * ratio
    advantage = tokens.advantages_L
    never = torch.zeros_like(tokens.is_trained_L)
    return ObjectiveTerms(weight * advantage, -4 / temperature * gate * advantage, weight, never, ~tokens.is_trained_L)
