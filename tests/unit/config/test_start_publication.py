"""Which runs publish version 0 before the servers sample."""

from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.config.debug import DebugConfig
from minpro_megatron.config.publish import PublishConfig
from minpro_megatron.config.server import ServerConfig
from tests.support.run_examples import example_config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"publish": PublishConfig(at_start=False)}, False),
        ({"debug": DebugConfig(trainer="timer")}, False),  # it sends no weights
        ({"debug": DebugConfig(journal="journal.sqlite")}, False),  # no servers
        ({"server": ServerConfig(device="cpu", dtype="float32", placement="shared")}, False),
    ],
)
def test_a_trainer_with_servers_of_their_own_does(tmp_path: Path, changes: dict[str, Any], expected: bool) -> None:
    assert example_config(tmp_path, **changes).publishes_at_start == expected
