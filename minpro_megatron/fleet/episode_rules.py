"""The rules of a run's episodes, from its settings."""

from contextlib import AsyncExitStack

from minpro_megatron.config.environment import PYTHON_TOOL
from minpro_megatron.config.run import RunConfig
from minpro_megatron.environments.framing import Framing
from minpro_megatron.environments.registry import make_environment, opened
from minpro_megatron.fleet.episodes import EpisodeRules
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.prompts.chat_template import ChatTemplate
from minpro_megatron.prompts.tokenizer import TextTokenizer


def make_framing(config: RunConfig, facts: ModelFacts, tokenizer: TextTokenizer) -> Framing:
    """How the environment's answers are presented. Raises UserError if the chat template cannot present them."""
    settings = config.environment
    template = ChatTemplate(config.model.hf_path, config.data.chat_template_arguments)
    return Framing.of(template, tokenizer, facts.stop_token_ids, settings.role, settings.max_answer_tokens)


async def episode_rules(
    config: RunConfig, facts: ModelFacts, tokenizer: TextTokenizer, stack: AsyncExitStack
) -> EpisodeRules | None:
    """The rules with the environment, which `stack` closes; None for a run without one. Raises UserError if the
    environment cannot be made, or if the chat template cannot present its answers."""
    settings = config.environment
    if not settings.enabled:
        return None
    return EpisodeRules(
        environment=await opened(make_environment(settings), stack),
        framing=make_framing(config, facts, tokenizer),
        decoder=tokenizer,
        vocabulary_size=facts.vocabulary_size,
        max_turns=config.sampling.max_turns,
        timeout_s=None if settings.name == PYTHON_TOOL else settings.timeout_s,
    )
