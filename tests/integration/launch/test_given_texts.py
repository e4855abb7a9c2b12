"""Texts of others as traces: graded by the run's reward in its worker processes."""

import json
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.errors import UserError
from minpro_megatron.launch.given_traces import GivenTraces, add_traces_of_texts
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompt_sets.prefixes import Trace
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt
from tests.support.calculator_models import write_calculator_model

PROMPTS = [Prompt(id=f"p{n}", source="s", text=f"{n}+1=", answer=str(n + 1)) for n in range(4)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    model = write_calculator_model(tmp_path / "hf")
    return TextTokenizer(str(model), read_model_facts(str(model)))


def added(folder: Path, tokenizer: TextTokenizer, rows: list[dict[str, Any]]) -> GivenTraces:
    """The traces of the texts, where p3 has one already."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = GivenTraces({"p3": Trace("4", "run before")})
    add_traces_of_texts(given, path, PROMPTS, tokenizer, RewardConfig(function="calculator", workers=1))
    return given


def test_only_texts_that_the_reward_calls_correct_are_traces(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    given = added(
        tmp_path,
        tokenizer,
        [
            {"id": "p0", "response": "2", "model": "wrong first"},
            {"id": "p0", "response": "1", "model": "another family"},
            {"id": "p1", "response": "3"},
            {"id": "p2", "response": "3<eos>"},
            {"id": "p3", "response": "4"},
            {"id": "elsewhere", "response": "1"},
        ],
    )
    assert given.traces == {"p0": Trace("1", "another family"), "p3": Trace("4", "run before")}
    assert given.unused == {
        "texts that the reward does not call correct": 2,
        "texts with special tokens": 1,
        "texts of other prompts, or of prompts with a trace": 2,
    }


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"id": "q", "response": "1"}], r"texts.jsonl: none of its 1 rows has the id of a prompt, such as 'p0'"),
        ([{"id": "p0"}], r"texts.jsonl, line 1: Object missing required field `response`.*; a row has the texts id"),
        ([{"id": "p0", "response": ""}], r"texts.jsonl, line 1: response is empty; remove the row"),
    ],
)
def test_what_is_wrong_with_a_file_of_texts(
    tmp_path: Path, tokenizer: TextTokenizer, rows: list[dict[str, Any]], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        added(tmp_path, tokenizer, rows)
