"""Prompts: damaged files are named to the line, and a group's content depends on the seed and its id alone."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from minpro_megatron.records import Prompt
from minpro_megatron.rollout.prompts import PromptStream, load_prompts, tokenize
from minpro_megatron.rollout.tokenizer import TextTokenizer
from minpro_megatron.serving.model_files import ModelFacts
from tests.unit.rollout_fakes import RESPONSES, run_config, tokenized_prompts, write_rows

FACTS = ModelFacts(vocabulary_size=16, stop_token_ids=(1,), max_position_embeddings=64)


def row(number: int, **changes: object) -> dict[str, object]:
    return {"id": f"r{number}", "source": "test", "prompt": f"{number}+1=", "answer": str(number + 1)} | changes


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    characters = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+="])}
    made = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    made.enable_truncation(2)  # a saved file may carry this; prompts must not be cut by it
    made.save(str(tmp_path / "tokenizer.json"))
    return TextTokenizer(str(tmp_path), FACTS)


def test_rows_become_prompts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(1), row(2, note="ignored")])
    path.write_text(path.read_text() + "\n")
    assert load_prompts(path, "data.train_file") == [
        Prompt(id="r1", source="test", text="1+1=", answer="2"),
        Prompt(id="r2", source="test", text="2+1=", answer="3"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"id": "x", "source": "s", "prompt": "1="', "line 2: .*truncated"),
        (json.dumps(row(2, answer=5)), r"line 2: .*`str`, got `int` - at `\$.answer`"),
        (json.dumps({"id": "x"}), "line 2: .*missing required field `source`"),
        (json.dumps(row(2, prompt="")), "line 2: prompt is empty"),
        (json.dumps(row(1)), "line 2: id 'r1' is also in line 1"),
        ("[1, 2]", "line 2: Expected `object`"),
        ("\udcff", "line 2:"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json.dumps(row(1)) + "\n").encode() + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=f"{path}, {problem}"):
        load_prompts(path, "data.train_file")


def test_a_missing_and_an_empty_file_are_named_by_their_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.train_file = .*No such file"):
        load_prompts(tmp_path / "none.jsonl", "data.train_file")
    with pytest.raises(ValueError, match=r"data.train_file = .*no rows"):
        load_prompts(write_rows(tmp_path / "empty.jsonl", []), "data.train_file")


def test_long_prompts_are_dropped_and_counted(
    tmp_path: Path, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(1), row(2, prompt="12345+6="), row(3)])
    kept = tokenize(load_prompts(path, "data.train_file"), tokenizer, 4, "data.train_file")
    assert [tokenized.prompt.id for tokenized in kept] == ["r1", "r3"]
    assert kept[0].token_ids.tolist() == [4, 13, 4, 14]
    assert "dropped 1 of 3 prompts" in caplog.text
    with pytest.raises(ValueError, match=r"sampling.max_prompt_tokens = 2"):
        tokenize(load_prompts(path, "data.train_file"), tokenizer, 2, "data.train_file")


def test_response_text_has_no_stop_token(tokenizer: TextTokenizer) -> None:
    assert tokenizer.response_text(np.asarray([5, 7, 1], dtype=np.int32)) == "24"
    assert tokenizer.response_text(np.asarray([5, 7], dtype=np.int32)) == "24"
    assert tokenizer.response_text(np.asarray([1], dtype=np.int32)) == ""


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        TextTokenizer(str(tmp_path), ModelFacts(vocabulary_size=5, stop_token_ids=(1,), max_position_embeddings=64))


def test_each_epoch_deals_every_prompt_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    stream = PromptStream(tokenized_prompts(9), run_config(tmp_path))
    dealt = [stream.group(group_id, -1, 0).prompt.id for group_id in range(18)]
    assert Counter(dealt[:9]) == Counter(dealt[9:]) == {f"p{number}": 1 for number in range(9)}
    assert dealt[:9] != dealt[9:]


def test_a_group_depends_on_seed_and_id_alone(tmp_path: Path) -> None:
    """Not on the groups before it, nor on the batch or the version: one that is repeated has its prompt and seeds."""
    config = run_config(tmp_path)
    forward, backward = PromptStream(tokenized_prompts(7), config), PromptStream(tokenized_prompts(7), config)
    there = [forward.group(group_id, 0, 0) for group_id in range(60)]
    back = [backward.group(group_id, 3, 2) for group_id in reversed(range(60))][::-1]
    for one, other in zip(there, back, strict=True):
        assert (one.group_id, one.prompt, one.sampling_seeds) == (other.group_id, other.prompt, other.sampling_seeds)
        assert (other.batch_index, other.policy_version) == (3, 2)
    other_seed = PromptStream(tokenized_prompts(7), config.model_copy(update={"seed": 1}))
    assert other_seed.group(0, 0, 0).sampling_seeds != there[0].sampling_seeds


def test_seeds_never_repeat(tmp_path: Path) -> None:
    stream = PromptStream(tokenized_prompts(4), run_config(tmp_path))
    seeds = [seed for group_id in range(150) for seed in stream.group(group_id, 0, 0).sampling_seeds]
    assert len(set(seeds)) == len(seeds) == 150 * RESPONSES
