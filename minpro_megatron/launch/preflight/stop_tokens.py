"""Checks that the end of the assistant's turn in the chat template is a stop token."""

from collections.abc import Iterator

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.turn_end import turn_end


def stop_token_warnings(config: RunConfig) -> Iterator[str]:
    """One line if the run uses a chat template whose end token is not a stop token, as with most base models: responses
    would continue with further turns up to their limit."""
    if not config.data.chat_template:
        return
    model, chosen = config.model.hf_path, config.sampling.extra_stop_tokens
    try:
        end = turn_end(config.data, model)
        stop_token_ids = read_model_facts(model, chosen).stop_token_ids
    except (UserError, OSError):  # other checks report problems of the model's files
        return
    if end is None or end[1] in stop_token_ids:
        return
    text, token_id = end
    shown = ",".join(f'"{token}"' for token in (*chosen, text))
    yield (
        f"data.chat_template = true: the template of model.hf_path = {model} ends the assistant's turn with {text} "
        f"(token {token_id}), which is not among the stop tokens ({', '.join(map(str, stop_token_ids))}: eos_token_id "
        "in config.json and generation_config.json, and sampling.extra_stop_tokens), so responses may continue to "
        f"sampling.max_response_tokens = {config.sampling.max_response_tokens}; set "
        f"'sampling.extra_stop_tokens=[{shown}]'"
    )
