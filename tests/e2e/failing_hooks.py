"""Hooks that pass the checks before a start and fail in a run; a module of its own, for the roles import it."""

import numpy as np


def fails_on_long_responses(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """An error for any response of more than three tokens: the checks use no longer ones."""
    if lengths.max() > 3:
        raise RuntimeError("a response is too long for this advantage")
    return rewards - rewards.mean()


def infinite_on_long_responses(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.where(lengths > 3, np.inf, rewards)
