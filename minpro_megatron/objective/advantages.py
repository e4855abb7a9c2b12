"""Advantages of a group of responses to one prompt."""

from collections.abc import Sequence

import numpy as np

MIN_DEVIATION = 1e-6


def group_advantages(rewards: Sequence[float]) -> np.ndarray:
    """(R - mean) / (std with Bessel's correction + 1e-6), float32 [responses]; zeros for equal rewards.

    A group of one response has no other response to compare with: its advantage is 0, as for equal rewards.
    arXiv:2402.03300, section 4.1.2. Raises ValueError if there are no rewards or one is not finite.

    >>> group_advantages([1.0, 0.0]).round(4).tolist()
    [0.7071, -0.7071]
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"rewards = {list(rewards)}: a group needs finite rewards, at least one")
    centred = values - values.mean()
    if np.ptp(values) == 0:
        return np.zeros(len(values), np.float32)
    return (centred / (values.std(ddof=1) + MIN_DEVIATION)).astype(np.float32)


def overlong_penalty(num_tokens: int, limit: int, buffer_tokens: int, scale: float) -> float:
    """The penalty added to the reward of a response of `num_tokens`: 0 up to limit - buffer_tokens, then decreasing
    linearly to -scale at the limit. arXiv:2503.14476, equation 13.

    >>> overlong_penalty(90, limit=100, buffer_tokens=20, scale=1.0)
    -0.5
    """
    over = num_tokens - (limit - buffer_tokens)
    return -scale * min(max(over / buffer_tokens, 0.0), 1.0)
