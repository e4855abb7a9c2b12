"""Checks that the model has a position for every token of the longest sequence that the settings allow."""

from collections.abc import Iterator
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.launch.roles import roles_of
from minpro_megatron.models.model_files import max_positions
from minpro_megatron.serving.server_command import context_length


def length_problems(config: RunConfig) -> Iterator[str]:
    """A line if the model, or the KV cache of the run's own servers, cannot hold the longest allowed sequence.

    Own servers need a margin besides. Without them (demonstrations, another run's journal, servers of others) the
    trainer's rows are what has to fit: the model computes positions that it was never trained for without an error.
    """
    roles, folder = roles_of(config), Path(config.model.hf_path)
    if not (folder / "config.json").is_file():
        return  # already reported
    try:
        if "serve" in roles and not config.server.urls:
            context_length(config)
        elif "train" in roles:
            _refuse_long_rows(config, max_positions(folder))
    except UserError as error:
        yield str(error)


def _refuse_long_rows(config: RunConfig, longest: int | None) -> None:
    length = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
    if longest is not None and length > longest:
        raise UserError(
            f"sampling.max_prompt_tokens + sampling.max_response_tokens = {length} exceeds the model's "
            f"max_position_embeddings = {longest}; lower one of them"
        )
