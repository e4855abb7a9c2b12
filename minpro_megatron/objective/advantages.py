"""Advantages of a group of responses to one prompt.

All estimators compare a response with the responses to the same prompt. A group of one response has nothing to compare
with, so its advantage is 0, as for equal rewards.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import numpy as np

from minpro_megatron.hooks.hook import Hook, is_import_path

MIN_DEVIATION = 1e-6


def group_normalized(rewards: np.ndarray) -> np.ndarray:
    """(R - mean) / (standard deviation with Bessel's correction + 1e-6). GRPO, arXiv:2402.03300, section 4.1.2.

    >>> group_normalized(np.array([1.0, 0.0])).round(4).tolist()
    [0.7071, -0.7071]
    """
    if len(rewards) == 1:
        return np.zeros(1)
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + MIN_DEVIATION)


def group_mean(rewards: np.ndarray) -> np.ndarray:
    """R - mean, without a standard deviation. Dr. GRPO, arXiv:2503.20783, section 3.2; PrefixRL's REINFORCE,
    arXiv:2601.18795.

    >>> group_mean(np.array([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.75, -0.25, -0.25, -0.25]
    """
    return rewards - rewards.mean()


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """R minus the mean of the other rewards: n / (n - 1) times `group_mean`. RLOO, arXiv:2402.14740, section 3.2.

    >>> leave_one_out(np.array([1.0, 0.0, 0.0, 1.0])).round(4).tolist()
    [0.6667, -0.6667, -0.6667, 0.6667]
    """
    num_others = max(len(rewards) - 1, 1)
    return (rewards - rewards.mean()) * (len(rewards) / num_others)


# float64 [responses] -> float64 [responses], by the name that loss.advantage has.
ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "group_normalized": group_normalized,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
}


class AdvantageFunction(Protocol):
    """The advantages of a group's responses, from their rewards (float64 [responses], after the penalty for long
    responses) and their numbers of tokens (int64 [responses]). It must depend on nothing else: every rank of the
    trainer calls it, and all must get the same numbers."""

    def __call__(self, rewards: np.ndarray, lengths: np.ndarray, /) -> Sequence[float] | np.ndarray: ...


def group_advantages(
    rewards: Sequence[float], estimator: str = "group_normalized", lengths: Sequence[int] | None = None
) -> np.ndarray:
    """The advantages of the responses with these rewards, float32 [responses]; zeros for equal rewards.

    `estimator` is a name of ADVANTAGES, or the import path of an AdvantageFunction, which also needs the responses'
    numbers of sampled tokens, `lengths`, and decides by itself what equal rewards mean. Raises ValueError for another
    one, if there are no rewards, and if one is not finite, and HookError if the function does not return one finite
    number per response.

    >>> group_advantages([1.0, 0.0], "leave_one_out").tolist()
    [1.0, -1.0]
    """
    if estimator not in ADVANTAGES and not is_import_path(estimator):
        raise ValueError(f"estimator = {estimator!r}: there is no such estimator; known: {', '.join(ADVANTAGES)}")
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"rewards = {list(rewards)}: a group needs finite rewards, at least one")
    if estimator not in ADVANTAGES:
        assert lengths is not None, "a function of the user's needs the numbers of tokens"
        return _imported(Hook("loss.advantage", estimator), values, np.asarray(lengths, np.int64))
    if np.ptp(values) == 0:  # the mean of equal numbers may differ from them in the last bit
        return np.zeros(len(values), np.float32)
    return ADVANTAGES[estimator](values).astype(np.float32)


@cache
def _function(hook: Hook) -> AdvantageFunction:
    return hook.load()


def _imported(hook: Hook, rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    function = _function(hook)
    with hook.running():
        found = function(rewards.copy(), lengths.copy())
    try:
        advantages = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        raise hook.error(f"it must return numbers, one per response, not {type(found).__name__}") from None
    if advantages.shape != rewards.shape:
        raise hook.error(f"it returned shape {advantages.shape} for {len(rewards)} responses; return one number each")
    if not np.isfinite(advantages).all():
        raise hook.error(f"it returned {advantages.tolist()} for the rewards {rewards.tolist()}; all must be finite")
    return advantages.astype(np.float32)


def overlong_penalty(num_tokens: int, limit: int, buffer_tokens: int, scale: float) -> float:
    """The penalty added to the reward of a response of `num_tokens`: 0 up to limit - buffer_tokens, then decreasing
    linearly to -scale at the limit. arXiv:2503.14476, equation 13.

    >>> overlong_penalty(90, limit=100, buffer_tokens=20, scale=1.0)
    -0.5
    """
    over = num_tokens - (limit - buffer_tokens)
    return -scale * min(max(over / buffer_tokens, 0.0), 1.0)
