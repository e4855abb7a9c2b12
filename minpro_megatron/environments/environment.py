"""What an environment is: it answers the policy's turns until the episode ends."""

from collections.abc import Sequence
from dataclasses import dataclass
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


class Environment(Protocol):
    """Named by `environment.name`; one object answers all episodes of a process, many of them at the same time.

    If it is an asynchronous context manager, it is entered before the first episode and left after the last.
    """

    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        """The answer to the turn; None: the episode ends with it. An error excludes the group from training."""
        ...
