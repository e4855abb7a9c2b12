"""Reward functions by name or import path, for `reward.function` and `reward.by_source`."""

import importlib
import re
from collections.abc import Callable
from typing import Any, cast

import msgspec

from minpro_megatron.command_line import did_you_mean
from minpro_megatron.errors import UserError


class Grade(msgspec.Struct, frozen=True, array_like=True):
    """A response's reward, and the part of it that was compared (None: all of it, or no answer was found)."""

    reward: float
    extracted: str | None = None


# (response text, answer) -> reward. A function that extracts the answer from the response returns a Grade, for audits.
RewardFunction = Callable[[str, str], float | Grade]

# A module is imported only in processes that grade with it: some need heavy libraries.
REWARDS = {
    "calculator": "minpro_megatron.rewards.calculator:grade",
    "dapo": "minpro_megatron.rewards.dapo:grade",
    "dapo_boxed": "minpro_megatron.rewards.dapo:grade_boxed",
    "math": "minpro_megatron.rewards.mathematics:grade",
}
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check_reward_name(name: str, field: str = "reward.function") -> None:
    """Raises UserError, naming `field`, if `name` is neither a known reward nor an import path."""
    if name not in REWARDS and not _IMPORT_PATH.fullmatch(name):
        raise UserError(
            f"{field} = {name!r}: there is no such reward{did_you_mean(name, REWARDS)}; known: "
            f"{', '.join(sorted(REWARDS))}, or the import path of your own function, such as package.module:function"
        )


def load_reward(name: str) -> RewardFunction:
    """The function of this name. Raises UserError for an unknown one, and for one that cannot be imported."""
    check_reward_name(name)
    module, _, function = REWARDS.get(name, name).partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise UserError(
            f"reward {name!r} cannot be loaded: {type(error).__name__}: {error}; the module must be importable from "
            "the folder in which the run is started"
        ) from error
    if not callable(found):
        raise UserError(
            f"reward {name!r} is not a function but of type {type(found).__name__}; give one of (response text, answer)"
        )
    return cast(RewardFunction, found)
