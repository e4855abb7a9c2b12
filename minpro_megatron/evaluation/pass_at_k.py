"""pass@k: the probability that at least one of k samples is correct, estimated from n samples per prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class PassAtK:
    """The mean over prompts and its standard error, clustered by prompt; the error of a single prompt is 0."""

    mean: float
    standard_error: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k), arXiv:2107.03374, section 2.1.

    Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.

    >>> pass_at_k(num_samples=4, num_correct=1, k=2)
    0.5
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"num_samples = {num_samples}, num_correct = {num_correct}, k = {k}: "
            "0 <= num_correct <= num_samples and 1 <= k <= num_samples must hold"
        )
    if num_correct == 0:
        return 0.0
    # Exact integers, divided once: a product of n floats would lose digits for large n.
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_pass_at_k(num_samples: int, num_correct: Sequence[int], k: int) -> PassAtK:
    """pass@k over prompts; `num_correct` has one count per prompt, each out of `num_samples`.

    The samples of one prompt depend on each other through the prompt, so the standard error is that of the
    mean of the prompts' values (arXiv:2411.00640, section 2.2, with equal clusters). Raises ValueError
    without prompts.
    """
    values = [pass_at_k(num_samples, count, k) for count in num_correct]
    if not values:
        raise ValueError("num_correct is empty: pass@k needs at least one prompt")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return PassAtK(mean, 0.0)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return PassAtK(mean, math.sqrt(variance / len(values)))


def pass_at_k_values(num_samples: int, num_correct: Sequence[int] | np.ndarray, largest_k: int) -> np.ndarray:
    """pass@1 .. pass@`largest_k` of every prompt, float64 [prompts, largest_k]; equal to `pass_at_k` but for rounding.

    Raises ValueError as `pass_at_k` does.
    """
    counts = np.asarray(num_correct, dtype=np.int64)
    if not 1 <= largest_k <= num_samples or (counts < 0).any() or (counts > num_samples).any():
        raise ValueError(
            f"num_samples = {num_samples}, num_correct from {counts.min(initial=0)} to {counts.max(initial=0)}, "
            f"largest_k = {largest_k}: 0 <= num_correct <= num_samples and 1 <= largest_k <= num_samples must hold"
        )
    drawn = np.arange(largest_k)
    # The probability that one more draw is wrong if all before it were: the factors of C(n - c, k) / C(n, k). Once all
    # wrong samples are used a factor is 0, and so is every later product.
    still_wrong = (num_samples - counts[:, None] - drawn) / (num_samples - drawn)
    return 1.0 - np.cumprod(still_wrong, axis=1)
