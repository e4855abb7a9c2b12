"""What the policy continues: a prompt's question as text, with instruction and chat template, and its token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.instructions import instruct, instruction_text
from minpro_megatron.errors import UserError
from minpro_megatron.prompts.chat_template import ChatTemplate
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt


@dataclass(frozen=True, slots=True)
class Rendering:
    """Converts prompts, without their prefixes, to texts and to token ids."""

    texts: Callable[[Sequence[Prompt]], list[str]]
    begins_itself: bool = False
    """The texts hold the begin token if the model wants one, as those of a chat template do."""

    def encode(self, prompts: Sequence[Prompt], tokenizer: TextTokenizer) -> list[np.ndarray]:
        """The token ids of each prompt without its prefix, int32."""
        texts = self.texts(prompts)
        return tokenizer.encode_all(texts) if self.begins_itself else tokenizer.encode_with_begin(texts)


AS_THEY_ARE = Rendering(lambda prompts: [prompt.text for prompt in prompts])
"""Without instruction and template."""


def make_rendering(data: DataConfig, hf_path: str) -> Rendering:
    """The rendering of the settings: instruction, then chat template, which gets the system message. Without a template
    the rendering raises UserError for a prompt with a system message.

    Raises UserError or FileNotFoundError if a chat template is wanted and the model has none.
    """
    text = instruction_text(data.instruction)
    if data.chat_template:
        template = ChatTemplate(hf_path, data.chat_template_arguments)

        def in_template(prompts: Sequence[Prompt]) -> list[str]:
            questions = [instruct(text, prompt.text) for prompt in prompts]
            return template.render_all(questions, systems=[prompt.system for prompt in prompts])

        return Rendering(in_template, begins_itself=True)

    def plain(prompts: Sequence[Prompt]) -> list[str]:
        if with_system := [prompt.id for prompt in prompts if prompt.system]:
            raise UserError(
                f"data.chat_template = false: the prompt {with_system[0]!r} has a system message, which only a chat "
                "template can present; set data.chat_template to true, or remove `system` from the rows"
            )
        return [instruct(text, prompt.text) for prompt in prompts]

    return Rendering(plain)
