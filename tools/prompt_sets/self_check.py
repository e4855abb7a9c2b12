"""Answers that the run's grader does not accept even of themselves: no response to such a prompt can be right."""

from collections.abc import Callable
from dataclasses import dataclass

from minpro_megatron.config.rewards import RIGHT_REWARD
from minpro_megatron.rewards.alternatives import alternatives
from minpro_megatron.rewards.registry import Grade, load_reward

_BOX, _LINE, _BARE = "So it is $\\boxed{{{}}}$.", "Answer: {}", "{}"
# The form that a grader looks for; a grader of one's own may look for any.
_FORMS = {"math": (_BOX,), "dapo": (_LINE,), "dapo_boxed": (_BOX,), "calculator": (_BARE,)}


@dataclass(frozen=True, slots=True)
class Refusal:
    answer: str
    problem: str  # what the grader raised; empty: it gave too little


def grader_check(reward: str) -> Callable[[str], Refusal | None]:
    """What says of an answer whether `reward` (a name, or package.module:function) gives RIGHT_REWARD or more to a
    response that is the answer; of several (rewards.alternatives) each one has to be accepted.

    Raises UserError for a reward that cannot be loaded.
    """
    grade = load_reward(reward)
    forms = _FORMS.get(reward, (_BOX, _LINE, _BARE))

    def is_accepted(response: str, answer: str) -> bool:
        given = grade(response, answer)
        return (given.reward if isinstance(given, Grade) else given) >= RIGHT_REWARD

    def check(answer: str) -> Refusal | None:
        try:
            for true in alternatives(answer):
                if not any(is_accepted(form.format(true), answer) for form in forms):
                    return Refusal(answer, "")
        except Exception as error:  # a grader of one's own may raise anything; it is shown
            return Refusal(answer, f"{type(error).__name__}: {error}")
        return None

    return check
