"""What an environment is: it answers the policy's turns until the episode ends."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from minpro_megatron.records import Prompt


@dataclass(frozen=True, slots=True)
class PastTurn:
    """An earlier turn of the same episode: what the policy wrote, and what the environment answered."""

    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class EpisodeTurn:
    """A turn of the policy that waits for its answer.

    `group_id` and `seed` identify the episode. If the collector is restarted, the episode begins again, with the same
    seed. After a fault of a server, a turn that had not been answered may be put again.
    """

    prompt: Prompt
    group_id: int
    seed: int
    text: str  # what the policy wrote in this turn, without the token that ends it
    earlier: Sequence[PastTurn] = ()
    is_evaluation: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What the policy reads next.

    `text` is presented as a turn of `environment.role` in the model's chat template. `token_ids` replaces it for an
    environment that makes its own tokens, which are inserted as they are, right after the token that ended the turn.
    """

    text: str = ""
    token_ids: Sequence[int] | None = None
    tool_calls: int = 0
    problem: str = ""  # why a tool call failed, for the records; the policy reads only the text


def checked_answer(answer: object) -> Answer | None:
    """The answer of an environment, with values that the journal and the trainer can read. Raises TypeError naming the
    field for others: they must not be recorded."""
    if answer is None:
        return None
    if not isinstance(answer, Answer):
        raise TypeError(f"`answer` must return an Answer or None, not {type(answer).__name__}")
    for name in ("text", "problem"):
        if not isinstance(value := getattr(answer, name), str):
            raise TypeError(f"Answer.{name} must be a str, not {type(value).__name__}")
    try:
        tool_calls = operator.index(answer.tool_calls)
    except TypeError:
        raise TypeError(f"Answer.tool_calls must be an int, not {type(answer.tool_calls).__name__}") from None
    return replace(answer, tool_calls=int(tool_calls), problem=recordable(answer.problem))


def recordable(text: str) -> str:
    """The text with a question mark for each lone surrogate, as in names of files that are no UTF-8: the journal's JSON
    cannot hold them."""
    return text.encode("utf-8", "replace").decode()


class Environment(Protocol):
    """Named by `environment.name`; one object answers all episodes of a process, many of them at the same time.

    If it is an asynchronous context manager, it is entered before the first episode and left after the last.
    """

    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        """The answer to the turn; None: the episode ends with it. An error excludes the group from training."""
        ...
