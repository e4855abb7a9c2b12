"""The special token with which a chat template ends the assistant's turn."""

from minpro_megatron.config.data import DataConfig
from minpro_megatron.models.model_files import added_tokens
from minpro_megatron.prompts.chat_template import ChatTemplate


def turn_end(data: DataConfig, hf_path: str) -> tuple[str, int] | None:
    """The special token that the template of the model in `hf_path` writes after a response, and its id; None if it
    writes other text, or nothing. Raises UserError for a template that cannot be read or rendered."""
    after = ChatTemplate(hf_path, data.chat_template_arguments).after_response().lstrip()
    found = [(text, token_id) for text, token_id in added_tokens(hf_path).items() if text and after.startswith(text)]
    return max(found, key=lambda pair: len(pair[0]), default=None)
