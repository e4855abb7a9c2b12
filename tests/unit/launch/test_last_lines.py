"""The launcher's last lines: of a finished run, and its advice after a start that has not finished it."""

from pathlib import Path

import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.errors import FAILED, INTERRUPTED, WRONG_INPUT
from minpro_megatron.launch.finished import finished_lines
from minpro_megatron.launch.launcher import remedy_line
from minpro_megatron.launch.supervisor import Outcome
from minpro_megatron.monitor.summary import summarize
from minpro_megatron.records import CollectorTotals
from tests.support.run_examples import example_config


@pytest.mark.parametrize("status", [FAILED, INTERRUPTED])
def test_a_failed_or_interrupted_start_is_resumed_by_the_same_command(status: int, tmp_path: Path) -> None:
    assert remedy_line(example_config(tmp_path), Outcome(status)) == "launch the same command again to resume"


@pytest.mark.parametrize("trainer", ["megatron", "timer"])
def test_after_a_wrong_setting_the_same_command_is_not_advised(trainer: str, tmp_path: Path) -> None:
    config = with_overrides(example_config(tmp_path), [f"debug.trainer={trainer}"])
    line = remedy_line(config, Outcome(WRONG_INPUT))
    assert line.startswith("correct that, then launch again")
    assert "same command" not in line


@pytest.mark.parametrize(("starts", "took"), [(0, "in 20 s"), (1, "in 20 s"), (3, "in 3 starts, the last one in 20 s")])
def test_a_resumed_run_has_not_taken_the_time_of_its_last_start(starts: int, took: str, tmp_path: Path) -> None:
    config = example_config(tmp_path)
    for start in range(starts):
        (config.run_dir / "starts" / str(start)).mkdir(parents=True)
    nothing = CollectorTotals(
        groups_issued=16, groups_consumed=16, groups_dropped=0, groups_not_graded=0, smallest_staleness=0,
        largest_staleness=2, versions_published=5, evaluations=[],
    )  # fmt: skip
    summary = summarize(
        config, nothing, steps=4, updates=8, wall_time_s=20.0, wall_time_by_phase_s={}, hf_export=None
    )  # fmt: skip
    assert finished_lines(config, summary, None)[0] == f"finished 4 global steps (8 updates) {took}, staleness 0-2"
