"""A base model with a chat template whose end token is not among its stop tokens is a warning with the setting."""

import json
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.launch.preflight.run_checks import warnings
from minpro_megatron.prompts.chat_template import ChatTemplate
from tests.support.chat_models import write_model
from tests.support.run_examples import HF_CONFIG, example_config, write_example_files

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS_WITH_EOS = "{% for message in messages %}[{{ message.role }}] {{ message.content }} {{ eos_token }}{% endfor %}"
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
FIRST_TURN_ONLY = "{{ messages[0].content }}<|im_end|>"
REFUSES = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"


def found(folder: Path, template: str, eos: Any = 2, *, extra: list[str] | None = None, chat: bool = True) -> list[str]:
    write_example_files(folder)
    write_model(folder / "hf", template)
    config = HF_CONFIG | {"vocab_size": 128, "max_position_embeddings": 512, "eos_token_id": 2}
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    (folder / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    files = str(folder / "train.jsonl"), str(folder / "heldout.jsonl")
    data = DataConfig(train_file=files[0], heldout_file=files[1], chat_template=chat)
    sampling = SamplingConfig(max_prompt_tokens=16, max_response_tokens=8, extra_stop_tokens=extra or [])
    return warnings(example_config(folder, data=data, sampling=sampling))


def test_an_end_token_that_stops_nothing_is_a_warning_with_the_setting(tmp_path: Path) -> None:
    (line,) = found(tmp_path, CHATML)
    assert line.startswith(
        f"data.chat_template = true: the template of model.hf_path = {tmp_path}/hf ends the assistant's"
    )
    assert "with <|im_end|> (token 4), which is not among the stop tokens (2: eos_token_id in config.json" in line
    assert "sampling.max_response_tokens = 8" in line
    override = line.rpartition("set '")[2].removesuffix("'")
    assert override == 'sampling.extra_stop_tokens=["<|im_end|>"]'
    assert found(tmp_path, CHATML, extra=json.loads(override.partition("=")[2])) == []


def test_the_tokens_that_are_chosen_already_stay_in_the_setting(tmp_path: Path) -> None:
    (line,) = found(tmp_path, CHATML, extra=["<bos>"])
    assert """set 'sampling.extra_stop_tokens=["<bos>","<|im_end|>"]'""" in line


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (CHATML, {"chat": False}),
        (CHATML, {"eos": [2, 4]}),
        (CHATML, {"eos": 4}),
        (CHATML, {"extra": ["<|im_end|>"]}),
        (ENDS_WITH_EOS, {}),
        (PLAIN, {}),
        (FIRST_TURN_ONLY, {}),
        (REFUSES, {}),
    ],
)
def test_no_warning_without_need(tmp_path: Path, template: str, options: dict[str, Any]) -> None:
    assert found(tmp_path, template, **options) == []


@pytest.mark.parametrize(
    ("template", "after"), [(CHATML, "<|im_end|>\n"), (ENDS_WITH_EOS, " <eos>"), (PLAIN, "\n"), (FIRST_TURN_ONLY, "")]
)
def test_what_follows_a_response_is_what_transformers_writes(tmp_path: Path, template: str, after: str) -> None:
    from transformers import PreTrainedTokenizerFast

    model = write_model(tmp_path, template)
    assert ChatTemplate(str(model), {}).after_response() == after
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "a response"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(model).apply_chat_template(turns, tokenize=False)
    assert theirs.rpartition("a response")[2] == (after or theirs)
