"""Runs with functions of the user's in place of objective, advantage and filter."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.monitor.history import read_history
from tests.e2e.conftest import SMALL_RUN, Launcher

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(400)]

SMALL = (*SMALL_RUN, "num_global_steps=2", "reward.function=tests.e2e.digits_reward:grade")
HOOKS = (
    "objective.name=docs.examples.objective:smooth_cispo", "objective.settings.scale=1.5",
    "loss.advantage=docs.examples.advantage:shorter_is_better", "data.filter=docs.examples.filter:teaches",
)  # fmt: skip


def test_a_run_trains_with_the_examples(launches: Launcher) -> None:
    run = launches("hooks", *SMALL, *HOOKS)
    status, output = run.wait(300)
    assert status == 0, output
    with JournalReader(run.run_dir) as reader:
        groups = list(reader.groups())
    consumed = [group for group in groups if group.state == "consumed"]
    dropped = [group for group in groups if group.state == "dropped"]
    assert len(consumed) == 2 * 4
    assert all(_is_kept(group.responses) for group in consumed)
    assert dropped
    assert not any(_is_kept(group.responses) for group in dropped)
    norms = [entry.metrics["optimizer/grad_norm"] for entry in read_history(run.run_dir) if entry.is_global_step]
    assert len(norms) == 2
    assert min(norms) > 0
    recorded = json.loads((run.run_dir / "inputs.json").read_text())["digests"]
    assert {name.split(" = ")[0] for name in recorded if " = " in name} == {
        "objective.name", "loss.advantage", "data.filter", "reward.function",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fails_on_long_responses", "RuntimeError: a response is too long for this advantage"),
        ("infinite_on_long_responses", "all must be finite"),
    ],
)
def test_a_hook_that_fails_ends_the_run_with_its_setting(launches: Launcher, name: str, told: str) -> None:
    run = launches(name, *SMALL, f"loss.advantage=tests.e2e.failing_hooks:{name}")
    status, output = run.wait(300)
    assert status != 0, output
    logs = output + "".join(path.read_text() for path in (run.run_dir / "logs").glob("*.log"))
    assert told in logs
    assert f"loss.advantage = tests.e2e.failing_hooks:{name}" in logs
    assert ("failing_hooks.py" in logs and "Traceback" in logs) == (name == "fails_on_long_responses")


def _is_kept(responses: Sequence[Any]) -> bool:
    """What docs/examples/filter.py decides: rewards differ, and at least half of the responses ended by themselves."""
    finished = sum(response.finish_reason == "stop" for response in responses)
    return len({response.reward for response in responses}) > 1 and 2 * finished >= len(responses)
