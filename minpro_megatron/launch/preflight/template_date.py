"""Checks that the chat template does not write today's date into the prompts."""

import json
from collections.abc import Iterator

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.prompts.chat_template import ChatTemplate

_DATE = {
    "date_string": "26 Jul 2024"
}  # the variable of Llama's templates, and the date that they write without a clock


def date_warnings(config: RunConfig) -> Iterator[str]:
    """One line if the run's prompts depend on the day on which they are rendered.

    It is no error: a run that began with such prompts could not be resumed, because its settings cannot change.
    """
    if not config.data.chat_template:
        return
    model, arguments = config.model.hf_path, config.data.chat_template_arguments
    try:
        if not ChatTemplate(model, arguments).shows_time():
            return
        has_variable = not ChatTemplate(model, arguments | _DATE).shows_time()
    except (UserError, OSError):  # other checks report problems of the model's files
        return
    remedy = (
        f"set 'data.chat_template_arguments={json.dumps(arguments | _DATE)}', with a date of your choice"
        if has_variable
        else "write a date in place of strftime_now into the template of a copy of the model"
    )
    yield (
        f"data.chat_template = true: the template of model.hf_path = {model} writes the date of each start into the "
        f"prompts, so a run that is resumed on another day continues with other prompts; {remedy}"
    )
