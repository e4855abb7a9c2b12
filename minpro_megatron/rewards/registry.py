"""Reward functions by name, as `collector.reward` names them."""

import importlib
from collections.abc import Callable

RewardFunction = Callable[[str, str], float]

# Name -> module and function. A module is imported only where it grades: some need heavy libraries.
REWARDS = {
    "calculator": ("minpro_megatron.rewards.calculator", "grade"),
}


def check_reward_name(name: str) -> None:
    """Raises ValueError if there is no reward function of this name."""
    if name not in REWARDS:
        raise ValueError(f"collector.reward = {name!r}: there is no such reward; known: {', '.join(sorted(REWARDS))}")


def load_reward(name: str) -> RewardFunction:
    """The function `grade(response_text, answer) -> float`. Raises ValueError for an unknown name."""
    check_reward_name(name)
    module, function = REWARDS[name]
    return getattr(importlib.import_module(module), function)
