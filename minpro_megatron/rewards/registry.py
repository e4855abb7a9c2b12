"""Rewards by name or import path, for `reward.function` and `reward.by_source`."""

from typing import cast

from minpro_megatron.command_line import did_you_mean
from minpro_megatron.errors import UserError
from minpro_megatron.hooks.hook import Hook, is_import_path
from minpro_megatron.rewards.forms import Grade, ResponseReward, RewardFunction, form_of

__all__ = ["HTTP", "REWARDS", "Grade", "check_reward_name", "load_response_reward", "load_reward"]

# A module is imported only in processes that grade with it: some need heavy libraries.
REWARDS = {
    "calculator": "minpro_megatron.rewards.calculator:grade",
    "dapo": "minpro_megatron.rewards.dapo:grade",
    "dapo_boxed": "minpro_megatron.rewards.dapo:grade_boxed",
    "math": "minpro_megatron.rewards.mathematics:grade",
}
HTTP = "http"  # the services of reward.urls


def check_reward_name(name: str, field: str = "reward.function") -> None:
    """Raises UserError, naming `field`, if `name` is neither a known reward nor an import path."""
    if name not in REWARDS and name != HTTP and not is_import_path(name):
        names = sorted([*REWARDS, HTTP])
        raise UserError(
            f"{field} = {name!r}: there is no such reward{did_you_mean(name, names)}; known: {', '.join(names)}, or "
            "the import path of your own function, such as package.module:function"
        )


def load_reward(name: str) -> RewardFunction:
    """The function of this name. Raises UserError for an unknown one, for one that cannot be imported, and for one that
    has none of the forms of a reward."""
    check_reward_name(name)
    if name == HTTP:
        raise UserError(f"reward {name!r} is no function: the services of reward.urls grade the responses")
    hook = Hook("reward", REWARDS.get(name, name))
    found = hook.load()
    try:
        form_of(found)
    except UserError as error:
        raise UserError(f"{hook}: {error}") from None
    return cast(RewardFunction, found)


def load_response_reward(name: str) -> ResponseReward:
    """As `load_reward`, for callers that have one response and no group. Raises UserError for the other forms too."""
    found = load_reward(name)
    if (form := form_of(found)) != "response":
        raise UserError(f"reward {name!r} has the form {form!r}, and here a function (response, answer) is needed")
    return cast(ResponseReward, found)
