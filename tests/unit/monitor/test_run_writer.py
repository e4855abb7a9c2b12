"""What RunWriter writes can be read back: by TensorBoard and from metrics.jsonl."""

import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minpro_megatron.monitor.history import HistoryTail, LineTail, read_history
from minpro_megatron.monitor.tensorboard_board import board_folder
from minpro_megatron.monitor.writer import RunWriter


def test_tensorboard_reads_what_was_written(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.scalars(0, {"reward/accuracy": 0.25, "optimizer/grad_norm": 2.0})
        writer.scalars(1, {"reward/accuracy": 0.5})
        writer.histogram(1, "response/length", np.array([1, 2, 3]))
        writer.histogram(1, "response/nothing", np.array([]))
        writer.text(1, "samples", "- `1+1=2` reward 1")
    board = EventAccumulator(str(board_folder(tmp_path)))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward/accuracy")] == [(0, 0.25), (1, 0.5)]
    assert board.Tags()["histograms"] == ["response/length"]
    assert board.Histograms("response/length")[0].histogram_value.num == 3
    assert board.Tensors("samples/text_summary")[0].tensor_proto.string_val[0] == b"- `1+1=2` reward 1"


def test_counts_are_written_as_a_histogram_without_the_empty_ends(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.counts(3, "ratio/log", np.array([0, 2, 0, 1, 0]), np.array([-3.0, -1.0, 0.0, 1.0, 3.0, 9.0]))
        writer.counts(3, "ratio/none", np.zeros(2, np.int64), np.array([0.0, 1.0, 2.0]))
    board = EventAccumulator(str(board_folder(tmp_path))).Reload()
    assert board.Tags()["histograms"] == ["ratio/log"]
    histogram = board.Histograms("ratio/log")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (3, -1.0, 3.0)
    assert list(zip(histogram.bucket_limit, histogram.bucket, strict=True)) == [(0.0, 2.0), (1.0, 0.0), (3.0, 1.0)]


def test_each_step_is_one_line_of_strict_json_at_once(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.scalars(3, {"optimizer/grad_norm": math.inf, "reward/mean": 1})
        line = (tmp_path / "metrics.jsonl").read_text()  # before the writer is closed
    content = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["step"] == 3
    assert content["metrics"] == {"optimizer/grad_norm": None, "reward/mean": 1.0}


def test_an_undeclared_name_is_refused_before_anything_is_written(tmp_path):
    with RunWriter(tmp_path) as writer, pytest.raises(ValueError, match="undeclared metrics reward/maen"):
        writer.scalars(0, {"reward/mean": 1.0, "reward/maen": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_restarted_writer_appends_and_loses_only_the_half_line(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.scalars(0, {"reward/mean": 0.1})
        writer.scalars(1, {"reward/mean": 0.2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')
    with RunWriter(tmp_path) as writer:
        writer.scalars(1, {"reward/mean": 0.3})
    entries = read_history(tmp_path)
    assert [(entry.step, entry.metrics["reward/mean"]) for entry in entries] == [(0, 0.1), (1, 0.3)]


def test_the_tail_waits_for_the_end_of_a_line(tmp_path):
    tail = HistoryTail(tmp_path)
    assert tail.new_entries() == []
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write('{"step": 0, "time": 1.0, "metrics": {"reward/mean": null}}\n{"step": 1, "time"')
        file.flush()
        (entry,) = tail.new_entries()
        assert entry.step == 0
        assert math.isnan(entry.metrics["reward/mean"])
        file.write(': 2.0, "metrics": {}}\n')
    assert [entry.step for entry in tail.new_entries()] == [1]
    assert tail.new_entries() == []


def test_an_evaluation_and_a_step_with_the_same_number_are_both_kept(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.scalars(4, {"reward/mean": 0.1})
        writer.scalars(4, {"eval/pass_at_1": 0.2})
    assert [sorted(entry.metrics) for entry in read_history(tmp_path)] == [["eval/pass_at_1"], ["reward/mean"]]


def test_the_evaluations_of_a_version_are_one_entry_beside_its_step(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.scalars(4, {"eval/pass_at_1": 0.2, "eval/standard_error": 0.1})
        writer.scalars(4, {"reward/mean": 0.1})
        writer.scalars(4, {"evaluation/accuracy/aime24": 0.3})
        writer.scalars(4, {"evaluation/accuracy/amc23": 0.4})
    evaluated, trained = read_history(tmp_path)
    assert evaluated.metrics == {
        "eval/pass_at_1": 0.2,
        "eval/standard_error": 0.1,
        "evaluation/accuracy/aime24": 0.3,
        "evaluation/accuracy/amc23": 0.4,
    }
    assert (evaluated.is_global_step, trained.is_global_step) == (False, True)
    assert trained.metrics == {"reward/mean": 0.1}


def test_a_publication_after_its_step_is_part_of_the_step(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.scalars(3, {"reward/mean": 0.1, "alarms/raised": 0})
        writer.scalars(3, {"publish/servers": 2, "alarms/raised": 1})
        writer.scalars(4, {"reward/mean": 0.2, "alarms/raised": 1})
        writer.scalars(3, {"reward/mean": 0.3, "alarms/raised": 0})  # the step is trained again
    third, fourth = read_history(tmp_path)
    assert (third.step, third.metrics) == (3, {"reward/mean": 0.3, "alarms/raised": 0})
    with RunWriter(tmp_path) as writer:
        writer.scalars(3, {"publish/servers": 1})
    written = read_history(tmp_path)
    assert [entry.metrics for entry in written] == [{**third.metrics, "publish/servers": 1}, fourth.metrics]
    assert [entry.time for entry in written] == [third.time, fourth.time]  # of the steps
    assert [entry.is_global_step for entry in written] == [True, True]


def test_a_file_that_was_replaced_by_a_shorter_one_is_read_again(tmp_path):
    path = tmp_path / "lines"
    path.write_text("one\ntwo\nthree\n")
    tail = LineTail(path)
    assert tail.new_lines() == ["one", "two", "three"]
    path.write_text("four\n")
    assert tail.new_lines() == ["four"]
