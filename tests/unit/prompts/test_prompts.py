"""Prompts: damaged files are named to the line, and a group's content depends on the seed and its id alone."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from minpro_megatron.config.data import DataConfig
from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.prompts.prompts import PromptStream, load_prompts, tokenize
from minpro_megatron.prompts.rendering import Rendering, make_rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt
from tests.support.rollout_fakes import RESPONSES, run_config, tokenized_prompts, write_rows

FACTS = ModelFacts(vocabulary_size=16, stop_token_ids=(1,), max_position_embeddings=64)
WITH_ZERO = Rendering(lambda prompts: [f"{prompt.text}0" for prompt in prompts])


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


@pytest.mark.parametrize("metadata", [{"tests": [["1", 2.5]], "level": None}, ["a"], "text", 0])
def test_the_metadata_of_a_row_may_be_anything(tmp_path: Path, metadata: object) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(1, metadata=metadata), row(2)])
    assert [prompt.metadata for prompt in load_prompts(path, "data.train_file")] == [metadata, None]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (json.dumps(row(2, metadata={"seed": 2**70})), "line 2: metadata has an integer of more than 64 bits; write"),
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


@pytest.mark.parametrize("where", ["x", "id", "answer", "pass_rate"])
def test_a_row_that_is_nested_very_deep_is_named(tmp_path: Path, where: str) -> None:
    path = tmp_path / "rows.jsonl"
    deep = f'{{"{where}": ' + "[" * 10**5 + "]" * 10**5 + "}"
    path.write_text(f"{json.dumps(row(1))}\n{deep}\n")
    with pytest.raises(UserError, match=f"^{path}, line 2: ") as caught:
        load_prompts(path, "data.train_file")
    assert "\n" not in str(caught.value)


VERL_ROW = {"data_source": "x", "prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("train.parquet", b"PAR1\x15\x04", "it is a parquet file, but a prompt file is JSON Lines"),
        ("train.jsonl", b"PAR1\x15\x04", "it is a parquet file, but a prompt file is JSON Lines"),
        (
            "train.jsonl.gz",
            gzip.compress(b"{}", mtime=0),
            "it is compressed with gzip, but a prompt file is JSON Lines",
        ),
        ("train.csv", b"question,answer\n1+1?,2\n", "it is a CSV file, but a prompt file is JSON Lines"),
        ("train.json", b'\xef\xbb\xbf [\n{"id": 1}\n]', "it is a JSON array, but a prompt file is JSON Lines"),
        ("verl.jsonl", json.dumps(VERL_ROW).encode(), "the row has the fields data_source, prompt, reward_model"),
        ("slime.jsonl", b'{"prompt": "1+1?", "label": "2"}', "the row has the fields prompt, label"),
    ],
)
def test_a_data_set_given_as_prompt_file_is_named_with_the_command_that_prepares_it(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_prompts(path, "data.train_file")
    message = str(caught.value)
    assert kind in message
    assert f"minpro prepare custom --input {path} --prompt-column COLUMN" in message
    assert "\n" not in message
    assert message.startswith((f"data.train_file = '{path}': ", f"{path}, line 1: "))


def test_a_pointer_of_git_lfs_is_no_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"Git LFS pointer instead of the file; fetch it with: git lfs pull"):
        load_prompts(path, "data.train_file")


def test_files_of_windows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(row(1))}\r\n\r\n{json.dumps(row(2))}".encode())
    assert [prompt.id for prompt in load_prompts(path, "data.train_file")] == ["r1", "r2"]


@pytest.mark.parametrize("rate", ["1.5", "-0.1", '"0.5"', "NaN"])
def test_a_pass_rate_is_a_share(tmp_path: Path, rate: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(1, pass_rate=1)) + "\n" + json.dumps(row(2))[:-1] + f', "pass_rate": {rate}}}\n')
    with pytest.raises(ValueError, match=f"{path}, line 2: .*"):
        load_prompts(path, "data.train_file")


def test_pass_rate_and_prefix_are_read_and_reach_the_group(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """The prefix is tokenized apart: its tokens are the same whatever the question ends with."""
    rows = [row(1, pass_rate=1, prefix="12"), row(2, prefix=""), row(3, pass_rate=None)]
    prompts = load_prompts(write_rows(tmp_path / "rows.jsonl", rows), "data.train_file")
    assert [(prompt.prefix, prompt.pass_rate) for prompt in prompts] == [("12", 1.0), ("", None), ("", None)]
    kept = tokenize(prompts, tokenizer, 7, "data.train_file", WITH_ZERO)
    assert kept[0].token_ids.tolist() == [4, 13, 4, 14, 3, 4, 5]
    group = PromptStream(kept[:1], run_config(tmp_path)).group(0, 0, 0)
    assert group.prompt_token_ids.tolist() == [4, 13, 4, 14, 3, 4, 5]
    assert group.prompt_token_ids.dtype == np.int32
    assert (group.prompt.source, group.prompt.prefix) == ("test", "12")


def test_the_prefix_counts_for_the_limit(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    prompts = load_prompts(write_rows(tmp_path / "rows.jsonl", [row(1, prefix="12"), row(2)]), "data.train_file")
    assert [kept.prompt.id for kept in tokenize(prompts, tokenizer, 5, "data.train_file")] == ["r2"]
    assert len(tokenize(prompts, tokenizer, 6, "data.train_file")) == 2


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        ("none", "What is {x}?"),
        (
            "dapo",
            "Solve the following math problem step by step. The last line of your response should be of the form "
            "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is {x}?\n\nRemember "
            'to put your answer on its own line after "Answer:".',
        ),
        ("boxed", "What is {x}?\nPlease reason step by step, and put your final answer within \\boxed{}."),
        ("Q: {question} {0} A:", "Q: What is {x}? {0} A:"),
    ],
)
def test_the_instruction_wraps_the_question(instruction: str, text: str) -> None:
    data = DataConfig(train_file="", heldout_file="", instruction=instruction)
    assert make_rendering(data, "no model is looked at").texts(
        [Prompt(id="0", source="s", text="What is {x}?", answer="")]
    ) == [text]


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
    several = [np.asarray(ids, dtype=np.int32) for ids in ([5, 7, 1], [], [7])]
    assert tokenizer.response_texts(several) == ["24", "", "4"]


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
