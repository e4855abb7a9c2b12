"""The check of the abort: it passes for the group as it is, and fails if closing does nothing or nothing waits."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from minpro_megatron.gpu_checks import abort
from minpro_megatron.publishing.update_group import UpdateGroup

# each group has a member in a process of its own; tests/mesh/test_update_group.py tests the group itself
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

CPU = torch.device("cpu")


def test_a_close_that_does_nothing_fails_and_the_real_one_passes() -> None:
    shapes, limits = abort.SMALL
    left: list[UpdateGroup] = []
    outcome = abort.check(CPU, replace(shapes, patience_s=1), limits, close=left.append)
    assert outcome.problems == ["the broadcast did not return within 1 s"]
    left[0].close()  # sets the thread free
    outcome = abort.check(CPU, shapes, limits)
    assert outcome.problems == []
    assert float(str(outcome.figures["closed_after_s"])) < 3
    assert outcome.figures["ending"] != "it still connects"


def test_where_the_broadcast_may_go_on_closing_must_return_all_the_same() -> None:
    """As with NCCL, whose members have not connected."""
    shapes, limits = abort.SMALL
    connecting = replace(shapes, patience_s=1, sets_free=False)
    left: list[UpdateGroup] = []
    outcome = abort.check(CPU, connecting, limits, close=left.append)
    assert (outcome.problems, outcome.figures["ending"]) == ([], "it still connects")
    over = threading.Event()

    def waits(group: UpdateGroup) -> None:
        left.append(group)
        over.wait()

    outcome = abort.check(CPU, connecting, limits, close=waits)
    over.set()
    left[-1].close()  # its name is free for the next test of this process
    assert outcome.problems == ["closing the group did not return within 1 s"]


def test_a_broadcast_that_waits_for_nobody_shows_nothing(monkeypatch: Any) -> None:
    monkeypatch.setattr(UpdateGroup, "broadcast", lambda self, data: None)
    shapes, limits = abort.SMALL
    outcome = abort.check(CPU, shapes, limits)
    assert outcome.problems == ["the broadcast did not wait for the silent member: it returned"]
