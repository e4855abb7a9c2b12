"""Prompts: damaged files are named to the line, and a batch's content depends on the seed and its index alone."""

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
from tests.unit.rollout_fakes import NUM_PROMPTS, RESPONSES, run_config, tokenized_prompts, write_rows

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
    stream = PromptStream(tokenized_prompts(9), run_config(tmp_path))  # 3 batches an epoch
    dealt = [group.prompt.id for index in range(6) for group in stream.groups(index, 0)]
    assert Counter(dealt[:9]) == Counter(dealt[9:]) == {f"p{number}": 1 for number in range(9)}
    assert dealt[:9] != dealt[9:]


def test_a_batch_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    forward, backward = PromptStream(tokenized_prompts(7), config), PromptStream(tokenized_prompts(7), config)
    there = [forward.groups(index, 0) for index in range(20)]
    back = [backward.groups(index, 0) for index in reversed(range(20))][::-1]
    for one, other in zip(there, back, strict=True):
        assert [(g.group_id, g.prompt.id, g.sampling_seeds) for g in one] == [
            (g.group_id, g.prompt.id, g.sampling_seeds) for g in other
        ]
    other_seed = PromptStream(tokenized_prompts(7), config.model_copy(update={"seed": 1}))
    assert [g.sampling_seeds for g in other_seed.groups(0, 0)] != [g.sampling_seeds for g in there[0]]


def test_group_ids_and_seeds_never_repeat(tmp_path: Path) -> None:
    stream = PromptStream(tokenized_prompts(4), run_config(tmp_path))
    groups = [group for index in range(50) for group in stream.groups(index, index)]
    assert [group.group_id for group in groups] == list(range(50 * NUM_PROMPTS))
    seeds = [seed for group in groups for seed in group.sampling_seeds]
    assert len(set(seeds)) == len(seeds) == 50 * NUM_PROMPTS * RESPONSES
