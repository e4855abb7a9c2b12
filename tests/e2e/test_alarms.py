"""A run made to misbehave: it warns, stops with a checkpoint, and goes on from it."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minpro_megatron.monitor.alarm_log import read_alarms
from minpro_megatron.monitor.history import read_history
from minpro_megatron.monitor.tensorboard_board import board_folder
from tests.e2e.conftest import Launcher

pytestmark = [pytest.mark.e2e, pytest.mark.long]

# A learning rate a thousand times too large: the policy forgets how to end a response, and tokens go their own ways.
WRECKED = (
    "server.engine=reference",
    "num_global_steps=8",
    "optimizer.learning_rate=0.05",
    "optimizer.warmup_global_steps=0",
    "optimizer.clip_grad=0",
    "alarms.window_steps=2",
    "alarms.effective_sample_size=0.9",
    "evaluation.num_prompts=2",
    "evaluation.samples_per_prompt=2",
    "batch.num_prompts=4",
    "batch.mini_batch_prompts=2",
    "batch.responses_per_prompt=4",
    "checkpoint.every_steps=0",
    "reward.function=tests.e2e.digits_reward:grade",
)


def test_a_wrecked_run_stops_with_a_checkpoint_and_goes_on_from_it(launches: Launcher) -> None:
    first = launches("wrecked", *WRECKED, 'alarms.stop_on=["effective_sample_size"]')
    status, output = first.wait(150)
    assert status == 1, output
    stopped = [alarm for alarm in read_alarms(first.run_dir) if alarm.name == "effective_sample_size"]
    assert len(stopped) == 1
    step = stopped[0].step
    assert "train: alarms.stop_on: effective_sample_size at global step" in output
    assert "objective/effective_sample_size" in output
    assert "launch the same command again to resume" in output
    assert (first.run_dir / "checkpoints" / "latest").read_text().strip().endswith(str(step + 1))
    assert [entry.step for entry in read_history(first.run_dir) if entry.is_global_step] == list(range(step + 1))

    again = launches("wrecked", *WRECKED, 'alarms.stop_on=["not_finite"]')
    status, output = again.wait(150)
    assert status == 0, output
    assert f"it resumes from its checkpoint after global step {step + 1}" in output
    # what went on was no news
    assert [alarm for alarm in read_alarms(again.run_dir) if alarm.name == "effective_sample_size"] == stopped
    entries = [entry for entry in read_history(again.run_dir) if entry.is_global_step]
    assert [entry.step for entry in entries] == list(range(8))
    assert entries[-1].metrics["alarms/raised_by_kind/effective_sample_size"] == 1
    summary = json.loads((again.run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["largest_staleness"]) == (8, 2)
    board = EventAccumulator(str(board_folder(again.run_dir))).Reload()
    assert step in [text.step for text in board.Tensors("alarms/text_summary")]
