"""The three forms of a reward function, and what each of them is given.

    def grade(response: str, answer: str) -> float                      one response
    def grade(group: GroupToGrade) -> list[float]                       all responses to a prompt
    async def grade(group: GroupToGrade) -> list[float]                 the same, while other groups wait for theirs

The form is recognized by the number of arguments, and by `async`. In place of a float each may return a Grade.
"""

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from minpro_megatron.errors import UserError

Form = Literal["response", "group", "async"]


class Grade(msgspec.Struct, frozen=True, array_like=True):
    """A response's reward, and the part of it that was compared (None: all of it, or no answer was found)."""

    reward: float
    extracted: str | None = None


class ResponseToGrade(msgspec.Struct, frozen=True, kw_only=True):
    """One response to the prompt of a group."""

    text: str  # with the given prefix of the prompt, if it has one
    # those that were sampled, with the stop token if there was one; without the prefix and what an environment gave
    token_ids: list[int] = []
    finish_reason: str = "stop"  # or "length"


class GroupToGrade(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt of a prompt file, and the responses to it."""

    id: str
    source: str
    prompt: str  # the question, without instruction and chat template
    answer: str
    responses: list[ResponseToGrade]
    prefix: str = ""
    metadata: Any = None  # the field `metadata` of the row


class ResponseReward(Protocol):
    """The reward of one response, which is compared with the `answer` of the row."""

    def __call__(self, response: str, answer: str, /) -> float | Grade: ...


class GroupReward(Protocol):
    """The rewards of the responses of a group, in their order."""

    def __call__(self, group: GroupToGrade, /) -> Sequence[float | Grade]: ...


class AsyncReward(Protocol):
    """The rewards of the responses of a group, in their order; other groups are graded while it awaits something."""

    def __call__(self, group: GroupToGrade, /) -> Awaitable[Sequence[float | Grade]]: ...


RewardFunction = ResponseReward | GroupReward | AsyncReward


def form_of(function: Callable[..., Any]) -> Form:
    """The form of a reward function. Raises UserError if it has none of the three.

    >>> form_of(lambda response, answer: 1.0), form_of(lambda group: [1.0])
    ('response', 'group')
    """
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function in C that does not state it
        return "response"
    if not is_async and _takes(signature, 2):
        return "response"
    if _takes(signature, 1):
        return "async" if is_async else "group"
    arguments = ", ".join(signature.parameters)
    raise UserError(
        f"its arguments are ({arguments}); a reward is a function (response, answer), or a function or async function "
        "(group), where the group has all responses to a prompt"
    )


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
