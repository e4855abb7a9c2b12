"""How many canaries there are at most, and how long they are. The planner reads it: it must not import HTTP."""

from typing import NamedTuple

from minpro_megatron.config.publish import NUM_CANARY_PROMPTS
from minpro_megatron.config.run import RunConfig
from minpro_megatron.serving.endpoints import num_servers


class Canaries(NamedTuple):
    """`count` sequences of a prompt and a continuation."""

    count: int
    prompt_tokens: int
    continuation_tokens: int


def most_canaries(config: RunConfig) -> Canaries:
    """The most and the longest that the trainer of a run may score after a publication: the servers, whose roundings
    differ, may all continue a prompt in their own way. A count of 0 where nothing is compared."""
    prompts = min(NUM_CANARY_PROMPTS, config.evaluation.num_prompts)
    tokens = continuation_tokens(config, prompts)
    count = prompts * num_servers(config.server) if tokens else 0
    return Canaries(count, config.sampling.max_prompt_tokens, tokens)


def continuation_tokens(config: RunConfig, num_prompts: int) -> int:
    """How many tokens a server generates for each of `num_prompts`: not more than for other responses, for which
    servers and rows have room."""
    each = -(-config.publish.canary_tokens // max(1, num_prompts))
    return min(each, config.sampling.max_response_tokens)
