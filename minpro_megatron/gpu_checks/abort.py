"""Closing the group of trainer and servers while a broadcast waits for a silent member.

With gloo the broadcast waits for the member to receive, and closing sets it free. With NCCL it waits while the two
members connect, which the other one never does: closing must return all the same, and the device must stay usable,
although the broadcast may keep its thread (see UpdateGroup.close).
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.parallel.device import process_group_backend
from minpro_megatron.publishing.update_group import UpdateGroup


@dataclass(frozen=True)
class Shapes:
    elements: int
    wait_s: float  # how long the broadcast is left to wait before the group is closed
    patience_s: float  # for what has to return
    join_s: float  # for the member to start and to join
    sets_free: bool  # whether closing must end the broadcast


# The broadcast must still wait when the group is closed, or nothing was shown.
_LIMITS = (Limit("closed_after_s", at_most=5), Limit("waited_before_close_s", at_least=0.2))
FULL = (Shapes(elements=2**26, wait_s=2, patience_s=15, join_s=40, sets_free=False), _LIMITS)
SMALL = (Shapes(elements=2**22, wait_s=0.3, patience_s=5, join_s=150, sets_free=True), _LIMITS)


def check(
    device: torch.device,
    shapes: Shapes,
    limits: tuple[Limit, ...],
    close: Callable[[UpdateGroup], None] = UpdateGroup.close,
) -> Outcome:
    """`close` closes the group. Afterwards the device must still compute, and a second close must do nothing."""
    group = UpdateGroup(
        address="127.0.0.1",
        world_size=2,
        name="gpu-check",
        backend=process_group_backend(device),
        timeout_s=shapes.join_s,
    )
    command = [sys.executable, "-m", "minpro_megatron.gpu_checks.silent_member", json.dumps(group.where), device.type]
    command.append(str(shapes.join_s))
    member = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        group.join()
        assert member.stdout is not None
        member.stdout.readline()  # it has joined too
        return judged(*_closed_while_waiting(group, device, shapes, close, limits))
    finally:
        member.kill()
        member.communicate()


def _closed_while_waiting(
    group: UpdateGroup,
    device: torch.device,
    shapes: Shapes,
    close: Callable[[UpdateGroup], None],
    limits: tuple[Limit, ...],
) -> tuple[dict[str, Figure], tuple[Limit, ...], list[str]]:
    data = torch.ones(shapes.elements, device=device)
    broadcast = _InThread(lambda: _broadcast_until_done(group, data))
    time.sleep(shapes.wait_s)
    early = not broadcast.thread.is_alive()
    start = time.monotonic()
    closing = _InThread(lambda: close(group))
    closing.thread.join(shapes.patience_s)
    closed_s = time.monotonic() - start
    broadcast.thread.join(max(0.1, shapes.patience_s - closed_s))
    problems = []
    if early:
        problems.append(f"the broadcast did not wait for the silent member: {broadcast.error or 'it returned'}")
    figures: dict[str, Figure] = {"waited_before_close_s": 0.0 if early else shapes.wait_s}
    must_return = [("the broadcast", broadcast)] if shapes.sets_free else []
    for what, one in (*must_return, ("closing the group", closing)):
        if one.thread.is_alive():
            problems.append(f"{what} did not return within {shapes.patience_s:g} s")
    if problems:
        return figures, (), problems
    ending = "it still connects" if broadcast.thread.is_alive() else broadcast.error or "returned without an error"
    figures |= {"closed_after_s": closed_s, "ending": ending}
    if closing.error:
        problems.append(f"closing the group raised {closing.error}")
    group.close()
    if float(data.sum()) != shapes.elements:
        problems.append("the device computes wrong sums after the group was closed")
    return figures, limits, problems


def _broadcast_until_done(group: UpdateGroup, data: torch.Tensor) -> None:
    group.broadcast(data)
    if data.is_cuda:
        torch.cuda.synchronize()


class _InThread:
    """Runs the work in a daemon thread; `error` is what it raised, in one line."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error = ""
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever torch raises for a group that was closed
            self.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
