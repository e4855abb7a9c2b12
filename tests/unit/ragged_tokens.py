"""Random ragged sequences with masked holes, and the objectives as float64 loops over their tokens.

The loops are written from the papers, a token at a time in plain Python numbers, so that they share nothing with
the code they check but the definitions.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from minpro_megatron.objective.scan import WholeSequenceScan
from minpro_megatron.objective.terms import PolicyTokens, policy_tokens


@dataclass(frozen=True)
class Tokens:
    """The tokens of some sequences, one sequence after another. All arrays [tokens]."""

    log_probs: np.ndarray
    behavior: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    sequence: np.ndarray  # which sequence a token belongs to

    def for_objective(self, dtype: torch.dtype) -> PolicyTokens:
        mask = torch.tensor(self.mask, dtype=dtype)
        return policy_tokens(
            torch.tensor(self.log_probs, dtype=dtype),
            torch.tensor(self.behavior, dtype=dtype),
            torch.tensor(self.advantages, dtype=dtype),
            mask,
            WholeSequenceScan(torch.tensor(self.sequence), mask),
            torch.arange(len(self.mask)),
        )

    @property
    def ratios(self) -> list[float]:
        """rho_t, with the log-ratio kept within +-20."""
        return [
            math.exp(min(20.0, max(-20.0, float(new) - float(old))))
            for new, old in zip(self.log_probs, self.behavior, strict=True)
        ]


def random_tokens(seed: int, num_sequences: int = 12, longest: int = 30, drift: float = 0.7) -> Tokens:
    """Sequences of 1 to `longest` tokens, about a third of them masked; some sequences are masked wholly.

    All numbers are float32 numbers, so that both precisions start from the very same values.
    """
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, num_sequences)
    total = int(lengths.sum())
    mask = (random.random(total) > 0.33).astype(np.float32)
    sequence = np.repeat(np.arange(num_sequences), lengths)
    mask[sequence == num_sequences // 2] = 0
    log_probs = -random.exponential(1.0, total).astype(np.float32)
    behavior = log_probs - random.normal(0, drift, total).astype(np.float32)
    advantages = random.choice(np.array([-1.3, -0.4, 0.0, 0.6, 1.7], np.float32), num_sequences)
    return Tokens(log_probs, behavior.astype(np.float32), advantages[sequence], mask, sequence)


def prefix_minima(tokens: Tokens) -> list[float]:
    """m_t = min of rho_i over the earlier unmasked tokens of the sequence, 1 where there are none."""
    minima = []
    for place in range(len(tokens.mask)):
        earlier = [
            ratio
            for index, ratio in enumerate(tokens.ratios[:place])
            if tokens.sequence[index] == tokens.sequence[place] and tokens.mask[index]
        ]
        minima.append(min(earlier) if earlier else 1.0)
    return minima


def clip(value: float, low: float, high: float) -> float:
    return low if value < low else high if value > high else value


def ppo_objective(log_ratio: torch.Tensor, advantage: float, low: float, high: float, dual: float) -> torch.Tensor:
    """PPO's pessimistic objective of one token with dual clip (arXiv:1912.09729, equation 5), differentiable."""
    ratio = log_ratio.exp()
    objective = torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)
    return (
        objective if advantage >= 0 else torch.maximum(objective, torch.tensor(dual * advantage, dtype=torch.float64))
    )
