"""Demonstrations as batches: their tokens, their order, which rows are used, and what is refused."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minpro_megatron.batching.sequences import token_sequences
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.feed.demonstration_feed import DemonstrationFeed, demonstration_problems
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.monitor.step_report import batch_metrics
from minpro_megatron.prompts.tokenizer import TextTokenizer
from tests.support.calculator_models import write_calculator_model
from tests.support.run_examples import example_config

STOP = 1
SFT = ["objective.name=sft", "batch.responses_per_prompt=1", "staleness.delay_steps=0"]
ROWS = [{"id": f"p{n}", "prompt": f"{n}+1=", "response": f"{n},1,2"} for n in range(5)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_calculator_model(tmp_path / "hf")


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(folder: Path, *overrides: str, rows: list[dict[str, Any]] = ROWS) -> RunConfig:
    path = write(folder, rows)
    return with_overrides(example_config(folder), [*SFT, f"data.demonstrations={path}", *overrides])


def test_a_demonstration_is_a_group_of_one_response_that_ends_with_a_stop_token(model: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer(str(model), read_model_facts(str(model)))
    rows = [ROWS[2] | {"prefix": "2,", "source": "s"}]
    batch = DemonstrationFeed(config_for(tmp_path, rows=rows)).batch(0)
    assert len(batch.groups) == 4  # the same one: the file has no others
    (group, *_) = batch.groups
    expected = np.concatenate(tokenizer.encode_all(["2+1=", "2,"]))
    assert group.issued.prompt_token_ids.tolist() == expected.tolist()
    (response,) = group.responses
    assert tokenizer.text(response.token_ids[:-1]) == "2,1,2"
    assert response.token_ids[-1] == STOP
    assert (response.loss_mask, response.is_graded) == (None, False)


def test_every_epoch_has_all_rows_and_its_own_order(model: Path, tmp_path: Path) -> None:
    feed = DemonstrationFeed(config_for(tmp_path))
    ids = [group.issued.prompt.id for index in range(5) for group in feed.batch(index).groups]  # 20: four epochs
    epochs = [ids[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == [row["id"] for row in ROWS] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_depends_only_on_seed_and_step(model: Path, tmp_path: Path) -> None:
    first, again = DemonstrationFeed(config_for(tmp_path)), DemonstrationFeed(config_for(tmp_path))
    other = DemonstrationFeed(config_for(tmp_path, "seed=1"))

    def ids(feed: DemonstrationFeed, index: int) -> list[str]:
        return [group.issued.prompt.id for group in feed.batch(index).groups]

    later = ids(first, 3)
    assert [ids(again, index) for index in range(4)][3] == later  # whatever was asked before
    assert any(ids(other, index) != ids(first, index) for index in range(4))


def test_every_token_is_trained_on_without_an_advantage(model: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path)
    batch = DemonstrationFeed(config).batch(2)
    groups = token_sequences(batch, config.loss, config.sampling.max_response_tokens)
    assert [len(group) for group in groups] == [1, 1, 1, 1]
    for (sequence,) in groups:
        assert sequence.loss_mask.all()
        assert sequence.advantage == 0
        assert sequence.staleness is not None
        assert not sequence.staleness.any()
    metrics = batch_metrics(batch, 2, 1.0)
    assert metrics.keys() == {"response/length_max", "response/length_mean", "batch/tokens"}
    num_tokens = sum(sequence.num_tokens for (sequence,) in groups)
    assert (metrics["batch/tokens"].value, metrics["response/length_max"].value) == (num_tokens, 6)


def test_long_rows_are_dropped_and_counted(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, {"id": "long", "prompt": "1+1=", "response": "1," * 10}]
    with caplog.at_level(logging.WARNING):
        feed = DemonstrationFeed(config_for(tmp_path, rows=rows))
    assert "data.demonstrations: dropped 1 of 6 rows" in caplog.text
    seen = Counter(group.issued.prompt.id for index in range(5) for group in feed.batch(index).groups)
    assert seen == dict.fromkeys((row["id"] for row in ROWS), 4)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"id": "a", "prompt": "1"}], "line 1: Object missing required field `response`"),
        ([{"id": "a", "prompt": "1", "response": ""}], "line 1: response is empty; remove the row"),
        ([{"id": "a", "prompt": "1", "response": "1," * 50}], "none of its 1 rows fits sampling.max_prompt_tokens"),
        ([], "the file has no rows"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line_before_the_run(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], problem: str
) -> None:
    (line,) = demonstration_problems(config_for(tmp_path, rows=rows))
    assert line.startswith(f"data.demonstrations = {tmp_path / 'sft.jsonl'}")
    assert problem in line


def test_a_missing_file_is_named(model: Path, tmp_path: Path) -> None:
    config = with_overrides(config_for(tmp_path), ["data.demonstrations=elsewhere.jsonl"])
    (line,) = demonstration_problems(config)
    assert line == "data.demonstrations = 'elsewhere.jsonl': No such file or directory; give a JSON Lines file"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("objective.name=minpro", r"data.demonstrations = '.*' with objective.name = minpro: .*set both or neither"),
        ("data.demonstrations=", "data.demonstrations = '' with objective.name = sft"),
        ("batch.responses_per_prompt=8", "batch.responses_per_prompt = 8 with data.demonstrations: .*set it to 1"),
        ("staleness.delay_steps=2", "staleness.delay_steps = 2 with data.demonstrations: .* set it to 0"),
        ("sampling.temperature=0.5", "sampling.temperature = 0.5 with data.demonstrations: .* set it to 1.0"),
        ("loss.kl.enabled=true", "loss.kl.enabled = True with data.demonstrations: .* set it to False"),
        ("data.curriculum=easy_first", "data.curriculum = easy_first with data.demonstrations: .* set it to none"),
        ("data.min_pass_rate=0.1", "data.min_pass_rate = 0.1 with data.demonstrations: .* set it to 0"),
        ("data.max_pass_rate=0.9", "data.max_pass_rate = 0.9 with data.demonstrations: .* set it to 1"),
        ('data.source_weights={"a": 1}', "data.source_weights = {'a': 1.0} with data.demonstrations: .* set it to {}"),
        ("loss.advantage=group_mean", "loss.advantage = group_mean with data.dem.* set it to group_normalized"),
        ("loss.equal_reward_groups=mask", "loss.equal_reward_groups = mask with data.demonstrations: .* to keep"),
        ("evaluation.every_steps=5", "evaluation.every_steps = 5 with data.demonstrations: .* set it to 0"),
        (
            'evaluation.benchmarks=[{"name": "a", "file": "a.jsonl"}]',
            r"evaluation.benchmarks = \[.*\] with data.demonstrations: .* set it to \[\]",
        ),
        ("server.placement=shared", "server.placement = shared with data.demonstrations: .* set it to disaggregated"),
        ("debug.journal=x", "debug.journal = x with data.demonstrations"),
    ],
)
def test_settings_of_sampled_responses_are_refused(model: Path, tmp_path: Path, override: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        config_for(tmp_path, override)


def test_a_group_of_one_is_refused_without_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch.responses_per_prompt = 1 must be at least 2"):
        with_overrides(example_config(tmp_path), ["batch.responses_per_prompt=1"])
