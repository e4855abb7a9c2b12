"""An environment that asks the tiny model for more, for runs of the whole system with episodes."""

import asyncio

from minpro_megatron.environments.environment import Answer, EpisodeTurn

# What makes a run of the demo one with episodes; the model's folder needs CHAT_TEMPLATE.
EPISODES = (
    "environment.name=tests.e2e.episode_environment:Again",
    "sampling.max_turns=3",
    "sampling.max_response_tokens=40",
    "data.chat_template=true",
    "reward.function=tests.e2e.episode_environment:odd",
)
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"


def odd(response: str, answer: str) -> float:
    """1 if the policy has written an odd number of characters: the rewards of a group differ, and training can tell."""
    return float(len(response) % 2)


class Again:
    """After a first turn of an even length it asks for two more, otherwise for one more."""

    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        await asyncio.sleep(0.01)
        if len(turn.earlier) == 1 and len(turn.earlier[0].text) % 2:
            return None
        return Answer(f"{len(turn.earlier) + 1}*1=", tool_calls=1)
