"""Metrics of episodes, and their samples in the report: turns are named, given tokens are grey and have no ratio."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from minpro_megatron.metrics.metric import values
from minpro_megatron.monitor.samples import read_samples
from minpro_megatron.monitor.step_report import StepReport, batch_metrics, token_staleness
from minpro_megatron.monitor.writer import RunWriter
from minpro_megatron.records import Batch, CollectedGroup, Turn
from minpro_megatron.report.report import write_report
from minpro_megatron.report.shown_samples import shown
from tests.support.batches import make_group
from tests.support.episodes import as_episode
from tests.support.run_examples import example_config

MASK = [1, 1, 0, 0, 1]


def episode_group() -> CollectedGroup:
    """A response of two turns whose tool failed, and one of a single turn."""
    group = make_group(1, 3, [1.0, 0.0], [5, 3])
    first, second = group.responses
    turns = [
        Turn(sampled_tokens=2, given_tokens=2, tool_calls=1, seconds=3.0, problem="status 1"),
        Turn(sampled_tokens=1, seconds=1.0),
    ]
    first = msgspec.structs.replace(as_episode(first, MASK), turns=turns)
    second = msgspec.structs.replace(second, turns=[Turn(sampled_tokens=3)])
    return msgspec.structs.replace(group, responses=[first, second])


BATCH = Batch(index=2, groups=[episode_group()])


def test_metrics_of_episodes_are_counted_by_hand() -> None:
    found = values(batch_metrics(BATCH, 2, 1.0))
    assert {name: value for name, value in found.items() if name.startswith("episode/")} == pytest.approx(
        {
            "episode/turns": 3 / 2,
            "episode/given_fraction": 2 / 8,
            "episode/tool_calls": 1 / 2,
            "episode/failed_turns": 1 / 2,
            "episode/answer_s": 4 / 2,
            "episode/answer_s_max": 3,
        }
    )
    assert found["staleness/max"] == 2
    assert token_staleness(BATCH, 2).tolist() == [2] * 6
    plain = values(batch_metrics(Batch(index=2, groups=[make_group(1, 3, [1.0], [5])]), 2, 1.0))
    assert not any(name.startswith("episode/") for name in plain)


def test_the_report_shows_turns_and_greys_given_tokens(tmp_path: Path) -> None:
    ratios = np.log(np.asarray([1.5, 0.5, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0], np.float32))
    with RunWriter(tmp_path) as writer:
        report = StepReport(writer, lambda ids: f"<{len(ids)}>")
        report.trained(np.zeros(8, np.float32), [ratios])
        times = {"time/step_s": 1.0, "time/wait_for_batch_s": 0.0, "time/train_s": 1.0}
        report.step(0, {"reward/mean": 0.5} | times, {}, BATCH)
    (tmp_path / "run.json").write_text(example_config(tmp_path).to_json())
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<span class="t given">given by the environment</span>' in page  # the legend, in the same grey
    assert page.index(".legend .t {") < page.index(".t.given {")  # of two rules for an element the later one counts
    (sample,) = read_samples(tmp_path)
    assert sample["ratios"] == pytest.approx([1.5, 0.5, None, None, 1.0])
    assert sample["given"] == [False, False, True, True, False]
    (drawn,) = shown([json.loads(json.dumps(sample))])
    assert [token.color for token in drawn.tokens] == ["high2", "low3", "given", "given", ""]
    assert drawn.tokens[2].note == "given by the environment"
    assert ("turns", "2 sampled, 2 given after 3.0 s (status 1); 1 sampled, 0 given after 1.0 s") in drawn.fields
