"""A plain prompt begins as the model's texts did in training: with the begin token, if its tokenizer puts one there."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from minpro_megatron.config.data import DataConfig
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.prompts.demonstrations import read_demonstrations
from minpro_megatron.prompts.prompts import TokenizedPrompt, tokenize
from minpro_megatron.prompts.rendering import Rendering, make_rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt
from tests.support.run_examples import HF_CONFIG, example_config

BEGIN, END = 1, 2
ADDED = ["<unk>", "<begin>", "<end>"]
CHARACTERS = {character: number for number, character in enumerate("0123456789+=x", start=len(ADDED))}
AROUND = processors.TemplateProcessing(single="<begin> $A <end>", special_tokens=[("<begin>", BEGIN), ("<end>", END)])
AS_LLAMA_3 = processors.Sequence([processors.ByteLevel(trim_offsets=True), AROUND])
AS_QWEN = processors.ByteLevel(trim_offsets=False)
PLAIN = make_rendering(DataConfig(train_file="", heldout_file=""), "no model is looked at")
Write = Callable[..., TextTokenizer]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(processor: object = None) -> TextTokenizer:
        made = Tokenizer(models.WordLevel(dict(zip(ADDED, range(3), strict=True)) | CHARACTERS, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        made.add_special_tokens(ADDED)
        if processor is not None:
            made.post_processor = processor
        hf = tmp_path / "hf"
        hf.mkdir(exist_ok=True)
        made.save(str(hf / "tokenizer.json"))
        return TextTokenizer(str(hf), ModelFacts(32, stop_token_ids=(END,), max_position_embeddings=64))

    return written


def prompt(text: str, prefix: str = "") -> Prompt:
    return Prompt(id="0", source="s", text=text, answer="", prefix=prefix)


def ids(text: str) -> list[int]:
    return [CHARACTERS[character] for character in text]


def tokens_of(one: Prompt, tokenizer: TextTokenizer, rendering: Rendering = PLAIN, longest: int = 64) -> list[int]:
    kept: list[TokenizedPrompt] = tokenize([one], tokenizer, longest, "data.train_file", rendering)
    assert kept[0].token_ids.dtype == np.int32
    return kept[0].token_ids.tolist()


@pytest.mark.parametrize("processor", [AROUND, AS_LLAMA_3])
def test_a_plain_prompt_begins_with_the_begin_token_of_its_tokenizer(write: Write, processor: object) -> None:
    """Once, before the question: not before the prefix, and nothing of what the tokenizer puts behind a text."""
    assert tokens_of(prompt("1+1="), write(processor)) == [BEGIN, *ids("1+1=")]
    assert tokens_of(prompt("1+1=", prefix="2"), write(processor)) == [BEGIN, *ids("1+1=2")]


@pytest.mark.parametrize("processor", [None, AS_QWEN])
def test_without_begin_token_the_tokens_are_those_of_the_text(write: Write, processor: object) -> None:
    assert tokens_of(prompt("1+1=", prefix="2"), write(processor)) == ids("1+1=2")


def test_a_prompt_that_holds_the_begin_token_gets_no_second_one(write: Write) -> None:
    assert tokens_of(prompt("<begin>1+1="), write(AROUND)) == [BEGIN, *ids("1+1=")]


def test_texts_of_a_chat_template_and_parts_of_prompts_get_none(write: Write) -> None:
    in_template = Rendering(PLAIN.texts, begins_itself=True)
    assert tokens_of(prompt("1+1="), write(AROUND), in_template) == ids("1+1=")
    for encode in (write(AROUND).encode_all, write(AROUND).encode_given):
        assert [one.tolist() for one in encode(["1+1=", ""])] == [ids("1+1="), []]


def test_the_begin_token_counts_for_the_limit(write: Write) -> None:
    assert len(tokens_of(prompt("1+1="), write(AROUND), longest=5)) == 5
    with pytest.raises(ValueError, match=r"data.train_file: no prompt has 1 .. sampling.max_prompt_tokens = 4 tokens"):
        tokens_of(prompt("1+1="), write(AROUND), longest=4)


def test_a_prompt_without_tokens_is_dropped_as_before(write: Write) -> None:
    with pytest.raises(ValueError, match=r"data.train_file: no prompt has 1 .. sampling.max_prompt_tokens"):
        tokens_of(prompt(""), write(AROUND))


def test_demonstrations_begin_as_prompts_do(tmp_path: Path, write: Write) -> None:
    write(AROUND)
    facts = HF_CONFIG | {"vocab_size": 32, "max_position_embeddings": 512, "eos_token_id": END}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(facts))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "0", "prompt": "1+1=", "prefix": "1", "response": "2"}))
    data = DataConfig(train_file="", heldout_file="", demonstrations=str(path))
    config = example_config(tmp_path)
    (one,) = read_demonstrations(config.model_copy(update={"data": data}))
    assert one.prompt_token_ids.tolist() == [BEGIN, *ids("1+1=1")]
    assert one.response_token_ids.tolist() == [*ids("2"), END]
