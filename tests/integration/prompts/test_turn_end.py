"""A demonstration ends with the special token that the chat template writes after a response."""

import json
from pathlib import Path

import pytest

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.prompts.demonstrations import read_demonstrations
from tests.support.chat_models import write_model
from tests.support.run_examples import HF_CONFIG, example_config, write_example_files

TURN = "{{% for message in messages %}}{{{{ message.role }}}}: {{{{ message.content }}}}{}{{% endfor %}}"
SFT = ["objective.name=sft", "batch.responses_per_prompt=1", "staleness.delay_steps=0", "data.chat_template=true"]


def config_for(folder: Path, end: str) -> RunConfig:
    write_example_files(folder)
    write_model(folder / "hf", TURN.format(end))
    config = HF_CONFIG | {"vocab_size": 128, "max_position_embeddings": 512, "eos_token_id": 2}
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    rows = folder / "sft.jsonl"
    rows.write_text(json.dumps({"id": "a", "prompt": "b", "response": "c"}) + "\n")
    sizes = ["sampling.max_prompt_tokens=32", "sampling.max_response_tokens=8"]
    return with_overrides(example_config(folder), [*SFT, f"data.demonstrations={rows}", *sizes])


@pytest.mark.parametrize(("end", "token"), [("<|im_end|>\n", 4), ("\n<eos>", 2)])
def test_it_is_the_templates_token_and_not_the_models_stop_token(end: str, token: int, tmp_path: Path) -> None:
    (one,) = read_demonstrations(config_for(tmp_path, end))
    assert len(one.response_token_ids) == 2
    assert one.response_token_ids[-1] == token


@pytest.mark.parametrize("end", ["\n", "\nUser: "])
def test_a_template_that_ends_with_other_text_is_refused(end: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"writes no special token .*set data\.chat_template to false: prompts"):
        read_demonstrations(config_for(tmp_path, end))
