"""A unit test fails if it starts a process or sleeps (tests/support/quiet_tests.py), or if it takes long."""

from collections.abc import Iterator

import pytest

from tests.support.cpu_budget import within_cpu_budget
from tests.support.quiet_tests import MAX_SLEEP_S, watched

# The first test that needs a library pays for its import: seconds, of torch's compiler for example.
MAX_CPU_S = 10.0
BREACHES = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Around the test and its fixtures."""
    with watched(item.nodeid) as breaches:
        item.stash[BREACHES] = breaches
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fails also for what fixtures did before."""
    with within_cpu_budget(item, MAX_CPU_S):
        result = yield
    if breaches := item.stash[BREACHES]:
        pytest.fail(
            f"a unit test starts no process and sleeps for at most {MAX_SLEEP_S:g} s; move it to tests/integration/:\n"
            + "\n".join(breaches),
            pytrace=False,
        )
    return result
