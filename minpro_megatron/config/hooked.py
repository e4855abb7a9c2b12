"""The functions of the user's that the settings of a run name by import path."""

from minpro_megatron.config.run import RunConfig
from minpro_megatron.hooks.hook import Hook, is_import_path


def hooks_of(config: RunConfig) -> list[Hook]:
    """The hooks of a run, each with its setting; docs/extending.md describes them."""
    named = {
        "objective.name": config.objective.name,
        "loss.advantage": config.loss.advantage,
        "data.filter": config.data.filter,
        "environment.name": config.environment.name,
        "reward.function": config.reward.function,
    }
    named |= {f"reward.by_source[{source!r}]": name for source, name in config.reward.by_source.items()}
    return [Hook(setting, value) for setting, value in named.items() if is_import_path(value)]
