"""Advantages of a group of responses to one prompt."""

from collections.abc import Sequence

import numpy as np

SMALLEST_DEVIATION = 1e-6


def group_advantages(rewards: Sequence[float]) -> np.ndarray:
    """(R - mean) / (std with Bessel's correction + 1e-6), float32 [responses]; zeros for equal rewards.

    arXiv:2402.03300, section 4.1.2. Raises ValueError for fewer than two rewards or one that is not finite.

    >>> group_advantages([1.0, 0.0]).round(4).tolist()
    [0.7071, -0.7071]
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"rewards = {list(rewards)}: a group needs at least two finite rewards")
    centred = values - values.mean()
    if np.ptp(values) == 0:
        return np.zeros(len(values), np.float32)
    return (centred / (values.std(ddof=1) + SMALLEST_DEVIATION)).astype(np.float32)
