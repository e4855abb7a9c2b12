"""Checks that a run's environment can be made, and that the model's chat template can present its answers."""

from collections.abc import Iterator

from minpro_megatron.config.environment import PYTHON_TOOL
from minpro_megatron.config.run import RunConfig
from minpro_megatron.environments.python_tool.sandbox import check_isolation
from minpro_megatron.environments.registry import make_environment
from minpro_megatron.errors import UserError
from minpro_megatron.fleet.episode_rules import make_framing
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.tokenizer import TextTokenizer


def environment_problems(config: RunConfig) -> Iterator[str]:
    """A line for each reason why the episodes of the run cannot be sampled; none without an environment."""
    if not config.environment.enabled:
        return
    try:
        make_environment(config.environment)
        if config.environment.name == PYTHON_TOOL:
            check_isolation(config.environment.python_tool)
    except UserError as error:
        yield str(error)
    except Exception as error:
        yield f"environment.name = {config.environment.name}: it raised {type(error).__name__}: {error}"
    model = config.model.hf_path
    try:
        facts = read_model_facts(model, config.sampling.extra_stop_tokens)
        tokenizer = TextTokenizer(model, facts)
    except (UserError, OSError):  # other checks report problems of the model's files
        return
    try:
        make_framing(config, facts, tokenizer)
    except (UserError, OSError) as error:
        yield str(error)
