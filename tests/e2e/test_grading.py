"""Runs whose grader fails: on some responses, and on everything that a policy says."""

import pytest

from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.monitor.history import read_history
from minpro_megatron.monitor.summary import read_summary
from tests.e2e.conftest import SMALL_RUN, Launcher

pytestmark = [pytest.mark.e2e, pytest.mark.long]

# What trains has no part in it.
TIMER = ("debug.trainer=timer", "debug.timer_step_s=0")
SETTINGS = (*SMALL_RUN, *TIMER, "num_global_steps=4", "batch.responses_per_prompt=2")


def test_groups_that_cannot_be_graded_are_replaced_and_counted(launches: Launcher) -> None:
    run = launches("some", *SETTINGS, "reward.function=tests.e2e.failing_reward:on_some")
    status, output = run.wait(200)
    assert status == 0, output
    summary = read_summary(run.run_dir)
    assert summary is not None
    with JournalReader(run.run_dir) as reader:
        groups = list(reader.groups())
        evaluations = reader.evaluations()
    dropped = [group for group in groups if group.state == "dropped"]
    consumed = [group for group in groups if group.state == "consumed"]
    assert len(consumed) == 4 * 4
    assert all(response.reward is not None for group in consumed for response in group.responses)
    assert dropped
    assert all(any(response.reward is None for response in group.responses) for group in dropped)
    assert summary.groups_not_graded == summary.groups_dropped == len(dropped)
    steps = [entry.metrics for entry in read_history(run.run_dir) if entry.is_global_step]
    assert steps[-1]["reward/grader_failed"] >= len(dropped)
    assert steps[-1]["reward/grader_timed_out"] == 0
    assert sum(result.not_graded for result in evaluations) == sum(
        entry.metrics["eval/not_graded"] for entry in read_history(run.run_dir) if "eval/not_graded" in entry.metrics
    )


def test_a_grader_that_fails_on_everything_ends_the_run(launches: Launcher) -> None:
    run = launches("all", *SETTINGS, "reward.function=tests.e2e.failing_reward:on_all")
    status, output = run.wait(200)
    assert status == 1, output
    assert "could not be graded" in output
    assert "RuntimeError: no grade for a wrong answer" in output
