"""An environment: the policy guesses a number, and reads whether it is too small or too large."""

import re

from minpro_megatron.environments.environment import Answer, EpisodeTurn


class Guessing:
    """`environment.name=docs.examples.environment:Guessing`, for prompts whose answer is an integer."""

    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        """None, which ends the episode, if the last number of the turn is right or if there is none."""
        guesses = re.findall(r"-?\d+", turn.text)
        if not guesses or int(guesses[-1]) == int(turn.prompt.answer):
            return None
        return Answer("too small" if int(guesses[-1]) < int(turn.prompt.answer) else "too large")
