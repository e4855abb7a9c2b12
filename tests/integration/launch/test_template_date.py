"""A chat template that writes today's date changes the prompts of a run that is resumed the next day: a warning."""

import json
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.launch.preflight.run_checks import warnings
from tests.support.chat_models import write_model
from tests.support.run_examples import HF_CONFIG, example_config, write_example_files

QUESTION = "{{ messages[0].content }}"
AS_LLAMA = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
AS_LLAMA += "Today Date: {{ date_string }} " + QUESTION
ALWAYS = "{{ strftime_now('%A') }} " + QUESTION
UNUSED = "{% set today = strftime_now('%Y') %}" + QUESTION


def found(folder: Path, template: str, chat: bool = True, **arguments: Any) -> list[str]:
    write_example_files(folder)
    write_model(folder / "hf", template)
    config = HF_CONFIG | {"vocab_size": 128, "max_position_embeddings": 512, "eos_token_id": 2}
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    files = str(folder / "train.jsonl"), str(folder / "heldout.jsonl")
    data = DataConfig(train_file=files[0], heldout_file=files[1], chat_template=chat, chat_template_arguments=arguments)
    sampling = SamplingConfig(max_prompt_tokens=40, max_response_tokens=8)
    return warnings(example_config(folder, data=data, sampling=sampling))


def test_a_date_that_a_variable_can_fix_is_a_warning_with_the_setting(tmp_path: Path) -> None:
    (line,) = found(tmp_path, AS_LLAMA, enable_thinking=False)
    assert line.startswith(
        f"data.chat_template = true: the template of model.hf_path = {tmp_path}/hf writes the date of each start into"
    )
    name, _, value = line.partition("set '")[2].partition("'")[0].partition("=")
    assert name == "data.chat_template_arguments"
    assert json.loads(value) == {"enable_thinking": False, "date_string": "26 Jul 2024"}
    assert found(tmp_path, AS_LLAMA, **json.loads(value)) == []


def test_a_date_without_a_variable_has_to_be_replaced_in_the_template(tmp_path: Path) -> None:
    (line,) = found(tmp_path, ALWAYS, date_string="26 Jul 2024")
    assert line.endswith("; write a date in place of strftime_now into the template of a copy of the model")


@pytest.mark.parametrize(("template", "chat"), [(QUESTION, True), (UNUSED, True), (ALWAYS, False)])
def test_prompts_without_a_date_give_no_warning(tmp_path: Path, template: str, chat: bool) -> None:
    assert found(tmp_path, template, chat) == []
