"""Answers that the run's grader does not accept even as their own response: no response can be correct."""

from collections.abc import Callable
from dataclasses import dataclass

from minpro_megatron.config.reward import RIGHT_REWARD
from minpro_megatron.rewards.alternatives import alternatives
from minpro_megatron.rewards.registry import Grade, load_response_reward

_BOX, _LINE, _BARE = "So it is $\\boxed{{{}}}$.", "Answer: {}", "{}"
# The form that a grader looks for; a user's grader may look for any.
_FORMS = {"math": (_BOX,), "dapo": (_LINE,), "dapo_boxed": (_BOX,), "calculator": (_BARE,)}


@dataclass(frozen=True, slots=True)
class Refusal:
    answer: str
    problem: str  # the grader's error; empty: its reward was too low


def grader_check(reward: str) -> Callable[[str], Refusal | None]:
    """A function that checks whether `reward` (a name, or package.module:function) gives RIGHT_REWARD or more to a
    response that is the answer. If there are several (rewards.alternatives), each one must be accepted.

    Raises UserError for a reward that cannot be loaded.
    """
    grade = load_response_reward(reward)
    forms = _FORMS.get(reward, (_BOX, _LINE, _BARE))

    def is_accepted(response: str, answer: str) -> bool:
        given = grade(response, answer)
        return (given.reward if isinstance(given, Grade) else given) >= RIGHT_REWARD

    def check(answer: str) -> Refusal | None:
        try:
            for true in alternatives(answer):
                if not any(is_accepted(form.format(true), answer) for form in forms):
                    return Refusal(answer, "")
        except Exception as error:  # a user's grader may raise anything; it is shown
            return Refusal(answer, f"{type(error).__name__}: {error}")
        return None

    return check
