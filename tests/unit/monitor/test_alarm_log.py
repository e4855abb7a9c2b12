"""Alarms reach the run's files, and a run that goes on knows which were raised before."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.monitor.alarm_log import FILE_NAME, AlarmLog, read_alarms
from minpro_megatron.monitor.history import read_history
from minpro_megatron.monitor.progress import Progress
from minpro_megatron.monitor.step_report import StepReport
from minpro_megatron.monitor.tensorboard_board import board_folder
from minpro_megatron.monitor.writer import RunWriter
from tests.support.batches import make_batch
from tests.support.run_examples import example_config

MEMBERS = [4, 4, 3, 3, 3, 4, 4, 4, 2, 2, 4, 4]  # with a window of 2: alarms at steps 2 and 8
TIMES = {"time/step_s": 2.0, "time/wait_for_batch_s": 0.5, "time/train_s": 1.0, "batch/tokens": 10.0}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return with_overrides(example_config(tmp_path), ["alarms.window_steps=2"])


def train(config: RunConfig, first: int, last: int) -> list[tuple[int, str]]:
    """Global steps `first` to `last`, as a trainer's rank 0 reports them; returns the alarms."""
    with RunWriter(config.run_dir, first or None) as writer:
        report = StepReport(writer, lambda ids: str(len(ids)), first, alarms=AlarmLog(config, first))
        raised = []
        for step in range(first, last + 1):
            raised += report.step(step, TIMES | {"fleet/members": MEMBERS[step]}, {}, make_batch())
    return [(alarm.step, alarm.name) for alarm in raised]


def stated(config: RunConfig) -> list[tuple[int, str]]:
    return [(alarm.step, alarm.name) for alarm in read_alarms(config.run_dir)]


BOTH = [(2, "server_loss"), (8, "server_loss")]


def test_an_alarm_is_in_every_place(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert train(config, 0, 11) == BOTH
    assert stated(config) == BOTH
    lines = [json.loads(line) for line in (config.run_dir / FILE_NAME).read_text().splitlines()]
    assert sorted(lines[0]) == ["name", "remedy", "seen", "step", "time"]
    assert [record.message for record in caplog.records] == [
        f"alarm: server_loss at global step {line['step']}: {line['seen']}; {line['remedy']}" for line in lines
    ]
    counted = [entry.metrics["alarms/raised"] for entry in read_history(config.run_dir)]
    assert counted == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    board = EventAccumulator(str(board_folder(config.run_dir))).Reload()
    assert [event.value for event in board.Scalars("alarms/raised_by_kind/server_loss")] == [1] * 6 + [2] * 4
    texts = board.Tensors("alarms/text_summary")
    assert [text.step for text in texts] == [2, 8]
    assert b"3 servers respond, 1 fewer than before" in texts[0].tensor_proto.string_val[0]


CANARIES = [0.01, 0.01, 0.9, 0.9, 0.01, 0.01, 0.01, 0.9]  # with a window of 2: alarms at steps 2 and 7


def publish_after(config: RunConfig, first: int, last: int) -> list[tuple[int, str]]:
    """As `train`, where the metrics of a step are written before it is published."""
    with RunWriter(config.run_dir, first or None) as writer:
        report = StepReport(writer, lambda ids: str(len(ids)), first, alarms=AlarmLog(config, first))
        raised = []
        for step in range(first, last + 1):
            raised += report.step(step, TIMES | {"fleet/members": MEMBERS[step]}, {}, make_batch())
            raised += report.published(step, {"publish/canary_server_max": CANARIES[step]})
    return [(alarm.step, alarm.name) for alarm in raised]


@pytest.mark.parametrize("resumed_at", range(1, 8))
def test_the_alarms_of_publications_that_come_after_their_steps_are_those_of_the_steps(
    config: RunConfig, resumed_at: int
) -> None:
    expected = [(2, "server_loss"), (2, "canary"), (7, "canary")]
    found = publish_after(config, 0, resumed_at - 1)
    assert found + publish_after(config, resumed_at, 7) == expected
    assert stated(config) == expected
    history = read_history(config.run_dir)
    assert [entry.metrics["publish/canary_server_max"] for entry in history] == CANARIES
    assert [entry.metrics["alarms/raised"] for entry in history] == [0, 0, 2, 2, 2, 2, 2, 3]
    board = EventAccumulator(str(board_folder(config.run_dir))).Reload()
    assert sorted(event.step for event in board.Scalars("publish/canary_server_max")) == list(range(8))


@pytest.mark.parametrize("resumed_at", range(1, 12))
def test_a_run_that_goes_on_raises_what_one_without_a_break_does(config: RunConfig, resumed_at: int) -> None:
    reached = min(resumed_at + 1, 11)  # the interrupted start had gone a step or two further
    train(config, 0, reached)
    assert train(config, resumed_at, 11) == [alarm for alarm in BOTH if alarm[0] >= resumed_at]
    assert stated(config) == BOTH
    assert read_history(config.run_dir)[-1].metrics["alarms/raised"] == 2


def test_a_killed_writers_half_line_is_dropped(config: RunConfig) -> None:
    train(config, 0, 5)
    with (config.run_dir / FILE_NAME).open("a") as file:
        file.write('{"step": 5, "na')
    train(config, 5, 11)
    assert stated(config) == BOTH


def test_the_display_shows_alarms_of_this_start(config: RunConfig) -> None:
    train(config, 0, 4)
    output = io.StringIO()
    with Progress(config, ("train",), Console(file=output, width=300)) as display:
        train(config, 5, 11)
        display.tick()
    shown = [line for line in output.getvalue().splitlines() if "alarm" in line]
    assert len(shown) == 1
    assert "alarm: server_loss at global step 8: 2 servers respond, 2 fewer than before; see logs/serve.log" in shown[0]


def test_histograms_and_samples_are_written_every_ten_steps(config: RunConfig) -> None:
    train(config, 0, 11)
    board = EventAccumulator(str(board_folder(config.run_dir)), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in board.Histograms("response/length")] == [0, 10]
    assert board.Histograms("staleness/token")[0].histogram_value.num == 18
    samples = [tensor.tensor_proto.string_val[0].decode() for tensor in board.Tensors("samples/text_summary")]
    assert samples[0].startswith("**reward 1**\n\n    1+1=5\n    (answer: 2)")
    assert np.allclose([event.value for event in board.Scalars("throughput/response_tokens_per_s")], 9.0)
