"""A unit test fails if it starts a process or sleeps (tests/support/quiet_tests.py), or if it takes long; and the unit
tests together must leave nothing in the checkout."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cpu_budget import within_cpu_budget
from tests.support.quiet_tests import MAX_SLEEP_S, watched

# The first test that needs a library pays for its import: seconds, of torch's compiler for example.
MAX_CPU_S = 10.0
CHECKOUT = Path(__file__).resolve().parents[2]
# At the top of the checkout, before any test file is imported, which may make files too.
BEFORE = set(os.listdir(CHECKOUT))
# What git ignores: runs and tools that work in the checkout at the same time may make these.
NOT_OURS = {"artifacts", "runs", "data", "build", "dist", ".pytest_cache", ".ruff_cache", "__pycache__"}
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


@pytest.fixture(scope="session", autouse=True)
def leaves_nothing_in_the_checkout() -> Iterator[None]:
    yield
    if left := sorted(set(os.listdir(CHECKOUT)) - BEFORE - NOT_OURS):
        pytest.fail(
            f"unit tests have left {', '.join(left)} in the checkout; let them write to tmp_path", pytrace=False
        )
