"""The numbers of a batch are those one would count by hand."""

import msgspec
import pytest

from minpro_megatron.metrics.declared import METRICS, check_declared
from minpro_megatron.metrics.metric import values
from minpro_megatron.monitor.step_report import batch_metrics
from minpro_megatron.records import Batch
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
