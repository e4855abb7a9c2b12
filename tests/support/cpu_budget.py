"""The processor time that a test of `make test` may take.

Processor time, not wall time: it does not grow when the machine is busy with something else. It counts this process
and the processes that it started and waited for.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def cpu_s() -> float:
    """Seconds of processor time so far, of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def within_cpu_budget(test: pytest.Item, max_cpu_s: float) -> Iterator[None]:
    """Fails a test that takes more within, unless it is marked `long`."""
    start = cpu_s()
    yield
    taken_s = cpu_s() - start
    if taken_s > max_cpu_s and test.get_closest_marker("long") is None:
        pytest.fail(
            f"the test took {taken_s:.1f} s of processor time, {max_cpu_s:g} s at most are allowed here: make it "
            "smaller, or mark it (or all but one of its cases) `long`",
            pytrace=False,
        )
