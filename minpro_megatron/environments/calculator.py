"""A calculator as an environment: `environment.name=minpro_megatron.environments.calculator:Calculator`.

It is the tool of a demonstration on CPUs (recipes/products.py). Unlike the Python tool it starts no process, so that
minutes of training are not spent on it.
"""

import re

from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.rewards.calculator import evaluate

# Longer operands belong to no task here; refusing them bounds the work and the length of an answer.
_CALL = re.compile(r"([0-9]{1,9})([-+*/])([0-9]{1,9})")


class Calculator:
    """Answers a turn that is one expression of two integers, such as `347*581`. Any other turn ends the episode."""

    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        """The value as an integer. A division without one is answered with an empty text and counted as a problem."""
        call = _CALL.fullmatch(turn.text)
        if call is None:
            return None
        value = evaluate(int(call[1]), call[2], int(call[3]))
        if value is None:
            return Answer("", tool_calls=1, problem=f"{turn.text} is not an integer")
        return Answer(str(value), tool_calls=1)
