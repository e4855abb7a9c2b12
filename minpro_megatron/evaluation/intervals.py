"""Means over prompts with bootstrap intervals: prompts are resampled, and each prompt keeps its samples."""

from collections.abc import Sequence

import msgspec
import numpy as np

NUM_RESAMPLES = 2000
COVERAGE = 0.95


class Estimate(msgspec.Struct, frozen=True):
    """A mean and its 95 % bootstrap interval. With a single prompt both limits equal the value."""

    value: float
    low: float
    high: float


def resampled_means(values_PK: np.ndarray, seed: int, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """The means of `num_resamples` draws of P prompts out of P with replacement, float64 [num_resamples, K]."""
    num_prompts = len(values_PK)
    times = np.random.default_rng(seed).multinomial(
        num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_resamples
    )
    return times @ values_PK / num_prompts


def intervals(means_K: np.ndarray, resampled_BK: np.ndarray) -> list[Estimate]:
    """Each mean with the middle 95 % of its resampled means (the percentile bootstrap)."""
    outside = (1 - COVERAGE) / 2
    low, high = np.quantile(resampled_BK, [outside, 1 - outside], axis=0)
    return [Estimate(float(m), float(a), float(b)) for m, a, b in zip(means_K, low, high, strict=True)]


def estimates(values_PK: np.ndarray, seed: int) -> list[Estimate]:
    """The means of `values_PK` [prompts, K] over prompts, with intervals."""
    return intervals(values_PK.mean(axis=0), resampled_means(values_PK, seed))


def average(resampled: Sequence[np.ndarray], means: Sequence[float]) -> Estimate:
    """The mean of several benchmarks' means, with equal weights; each benchmark is resampled separately."""
    (estimate,) = intervals(np.asarray([np.mean(means)]), np.mean(resampled, axis=0)[:, None])
    return estimate
