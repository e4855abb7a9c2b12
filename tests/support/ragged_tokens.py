"""Random ragged sequences with masked holes, and how objectives are asked about them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from minpro_megatron.config.listing import sections_in
from minpro_megatron.config.objective import ImportedObjectiveConfig, ObjectiveConfig, ObjectiveSection, SftConfig
from minpro_megatron.objective.across_ranks.ranking import OneRank
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import MiniBatch, ObjectiveTerms, PolicyTokens, policy_tokens

# the settings of every objective of reinforcement learning as they are where nothing is set
DEFAULTS: dict[str, Any] = {
    section.model_fields["name"].default: section()
    for section in sections_in(ObjectiveConfig)
    if section not in (ImportedObjectiveConfig, SftConfig)
}


@dataclass(frozen=True)
class Tokens:
    """The tokens of some sequences, one sequence after another. All arrays [tokens]."""

    log_probs: np.ndarray
    behavior: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    sequence: np.ndarray  # which sequence a token belongs to

    def for_objective(self, dtype: torch.dtype, ids: np.ndarray | None = None) -> PolicyTokens:
        """`ids` are the tokens' places in the mini-batch; None: they are all of it."""
        mask = torch.tensor(self.mask, dtype=dtype)
        return policy_tokens(
            torch.tensor(self.log_probs, dtype=dtype),
            torch.tensor(self.behavior, dtype=dtype),
            torch.tensor(self.advantages, dtype=dtype),
            mask,
            WholeSequenceScan(torch.tensor(self.sequence), mask),
            torch.arange(len(self.mask)) if ids is None else torch.tensor(ids),
        )

    # Cached, because the loops over tokens ask for one entry at a time.
    @cached_property
    def log_ratios(self) -> list[float]:
        """delta_t = log pi - log pi_old, kept within +-20."""
        return [
            min(20.0, max(-20.0, float(new) - float(old)))
            for new, old in zip(self.log_probs, self.behavior, strict=True)
        ]

    @cached_property
    def ratios(self) -> list[float]:
        return [math.exp(delta) for delta in self.log_ratios]

    @property
    def trained(self) -> np.ndarray:
        return self.mask > 0

    def trained_of_sequences(self) -> list[list[int]]:
        """The trained tokens of each sequence that has any, in order."""
        places = [np.flatnonzero((self.sequence == name) & self.trained) for name in np.unique(self.sequence)]
        return [of.tolist() for of in places if len(of)]

    def where(self, chosen: np.ndarray) -> "Tokens":
        return Tokens(*(getattr(self, field.name)[chosen] for field in fields(self)))


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


def long_tokens(seed: int, drift: float = 0.04) -> Tokens:
    """Sequences of 2,000, 700 and 1 tokens with few holes; the products of their ratios stay around 1."""
    random = np.random.default_rng(seed)
    sequence = np.repeat([0, 1, 2], [2000, 700, 1])
    log_probs = -random.exponential(1.0, len(sequence)).astype(np.float32)
    behavior = (log_probs - random.normal(0, drift, len(sequence))).astype(np.float32)
    mask = (random.random(len(sequence)) > 0.05).astype(np.float32)
    mask[-1] = 1
    return Tokens(log_probs, behavior, np.array([1.7, -0.8, 0.6], np.float32)[sequence], mask, sequence)


def far_tokens(seed: int) -> Tokens:
    """Sequences some of whose log-ratios are far beyond what is clipped: up to +-60, with log-probs as small."""
    tokens, random = random_tokens(seed), np.random.default_rng(seed + 1000)
    far = random.random(len(tokens.mask)) < 0.3
    shift = random.uniform(-60, 60, len(tokens.mask)).astype(np.float32)
    log_probs = np.where(far, np.minimum(shift, 0), tokens.log_probs)
    behavior = np.where(far, np.minimum(-shift, 0), tokens.behavior)
    return replace(tokens, log_probs=log_probs.astype(np.float32), behavior=behavior.astype(np.float32))


def one_sequence(ratios: Sequence[float], advantage: float = 1.0, mask: Sequence[float] | None = None) -> Tokens:
    count = len(ratios)
    return Tokens(
        np.log(ratios),
        np.zeros(count),
        np.full(count, advantage),
        np.ones(count) if mask is None else np.array(mask, np.float64),
        np.zeros(count, np.int64),
    )


def cut(tokens: Tokens, num_parts: int, seed: int) -> list[np.ndarray]:
    """The places of the tokens of each part, sequences dealt to parts at random; some parts may get none."""
    part_of_sequence = np.random.default_rng(seed).integers(0, num_parts, int(tokens.sequence.max()) + 1)
    return [np.flatnonzero(part_of_sequence[tokens.sequence] == part) for part in range(num_parts)]


def surveyed(
    name: str, micro_batches: Sequence[PolicyTokens], settings: ObjectiveSection, seed: int = 0
) -> list[PolicyTokens]:
    """The micro-batches with what the objective's survey says of them, on one rank."""
    survey = OBJECTIVES[name].survey
    if survey is None:
        return list(micro_batches)
    found = survey(MiniBatch(micro_batches, OneRank(), seed), settings)
    return [replace(seen, surveyed_L=of) for seen, of in zip(micro_batches, found, strict=True)]


def terms_of(
    name: str, tokens: Tokens, settings: ObjectiveSection, dtype: torch.dtype = torch.float64, seed: int = 0
) -> ObjectiveTerms:
    """The objective's terms where `tokens` are the mini-batch, in one micro-batch."""
    (seen,) = surveyed(name, [tokens.for_objective(dtype)], settings, seed)
    return OBJECTIVES[name].terms(seen, settings)


def prefix_minima(tokens: Tokens) -> list[float]:
    """m_t = min of rho_i over the earlier unmasked tokens of the sequence, 1 where there are none."""
    minima, ratios = [1.0] * len(tokens.mask), tokens.ratios
    smallest, of = None, None
    for place, name in enumerate(tokens.sequence):
        if name != of:
            smallest, of = None, name
        if smallest is not None:
            minima[place] = smallest
        if tokens.mask[place]:
            smallest = ratios[place] if smallest is None else min(smallest, ratios[place])
    return minima
