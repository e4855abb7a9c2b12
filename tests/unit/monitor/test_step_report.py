"""The numbers of a batch are those one would count by hand."""

import logging
from pathlib import Path

import msgspec
import pytest

from minpro_megatron.metrics.declared import METRICS, check_declared
from minpro_megatron.metrics.metric import values
from minpro_megatron.monitor.step_report import StepReport, batch_metrics
from minpro_megatron.monitor.writer import RunWriter
from minpro_megatron.records import Batch, EvaluationResult
from tests.support.batches import make_group

BATCH = Batch(
    index=9,
    groups=[
        make_group(1, 3, [1.0, 0.0, -0.5], [5, 2, 11], versions=[7, 6, 8], finish_reasons=["stop", "stop", "length"]),
        make_group(2, 10, [1.0, 1.0], [1, 4], versions=[9, 9]),
        make_group(3, 1, [0.0, 0.0, 0.0], [3, 3, 3], versions=[7, 7, 7], finish_reasons=["length"] * 3),
    ],
)


def test_batch_metrics_are_counted_by_hand() -> None:
    assert values(batch_metrics(BATCH, 9, 1.0)) == pytest.approx(
        {
            "reward/mean": 2.5 / 8,
            "reward/min": -0.5,
            "reward/max": 1.0,
            "reward/accuracy": 3 / 8,
            "reward/equal_groups": 2 / 3,
            "reward/accuracy_by_prompt/plain": 3 / 8,
            "reward/equal_groups_by_prompt/plain": 2 / 3,
            "response/length_by_prompt/plain": 32 / 8,
            "staleness/min": 0,  # step 9 less the oldest version of each group: 6, 9, 7
            "staleness/mean": (3 + 0 + 2) / 3,
            "staleness/max": 3,
            "response/length_mean": 32 / 8,
            "response/length_max": 11,
            "response/truncated_fraction": 4 / 8,
            "batch/tokens": 32 + 3 * 3 + 2 * 10 + 3 * 1,
        }
    )


def test_the_log_has_a_line_for_each_step_and_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    result = EvaluationResult(
        policy_version=3, pass_at_1=0.25, standard_error=0.02, mean_reward=0.25, not_graded=0, num_prompts=8,
        samples_per_prompt=2, mean_response_tokens=3.0, wall_time_s=1.0,
    )  # fmt: skip
    with RunWriter(tmp_path) as writer:
        report = StepReport(writer, lambda ids: "")
        times = {"time/step_s": 1.5, "time/wait_for_batch_s": 0.0, "time/train_s": 1.25, "time/publish_s": 0.25}
        for step in range(2):
            report.step(step, {"reward/mean": 0.5 + step, "ratio/max": 1.25} | times, {}, BATCH)
        report.evaluations([result, msgspec.structs.replace(result, benchmark="aime24", pass_at_1=0.125)])
        report.evaluations([result])
    assert [record.getMessage() for record in caplog.records] == [
        "global step 0: reward 0.5, largest ratio 1.25; 1.50 s (training 1.25, publishing 0.25)",
        "global step 1: reward 1.5, largest ratio 1.25; 1.50 s (training 1.25, publishing 0.25)",
        "policy version 3: held-out pass@1 25.0 % +- 2.0 %",
        "policy version 3: aime24 pass@1 12.5 % +- 2.0 %",
    ]


def test_right_is_what_the_right_reward_says() -> None:
    """A reward above 0 is not enough: with -1 and +1 as with 0 and 1, with any other scale only what is set."""
    shares = {limit: batch_metrics(BATCH, 9, limit)["reward/accuracy"].value for limit in (1.0, 0.0, -0.5, 1.5)}
    assert shares == {1.0: 3 / 8, 0.0: 7 / 8, -0.5: 1.0, 1.5: 0.0}


def test_prompts_with_a_prefix_are_counted_apart() -> None:
    prefixed = make_group(4, 12, [1.0, 1.0, 0.0, 1.0], [2, 2, 5, 3], versions=[9] * 4)
    issued = msgspec.structs.replace(
        prefixed.issued, prompt=msgspec.structs.replace(prefixed.issued.prompt, prefix="7,0")
    )
    mixed = Batch(index=9, groups=[*BATCH.groups, msgspec.structs.replace(prefixed, issued=issued)])
    metrics, plain = values(batch_metrics(mixed, 9, 1.0)), values(batch_metrics(BATCH, 9, 1.0))
    assert {name: value for name, value in metrics.items() if name.endswith("/plain")} == {
        name: value for name, value in plain.items() if name.endswith("/plain")
    }
    assert {name: value for name, value in metrics.items() if name.endswith("/prefixed")} == {
        "reward/accuracy_by_prompt/prefixed": 3 / 4,
        "reward/equal_groups_by_prompt/prefixed": 0.0,
        "response/length_by_prompt/prefixed": 12 / 4,
    }
    assert metrics["reward/accuracy"] == (3 + 3) / 12
    check_declared(metrics)


def test_metrics_are_declared_with_the_reduction_they_use() -> None:
    for name, metric in batch_metrics(BATCH, 9, 1.0).items():
        declared = METRICS.get(name) or METRICS[f"{name.rpartition('/')[0]}/<kind>"]
        assert declared.reduction == metric.reduction, name
