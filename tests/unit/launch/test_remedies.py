"""What the launcher advises after a start that has not finished the run."""

from pathlib import Path

import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.errors import FAILED, INTERRUPTED, WRONG_INPUT
from minpro_megatron.launch.launcher import remedy_line
from minpro_megatron.launch.supervisor import Outcome
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
