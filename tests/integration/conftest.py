"""Every test here has the marker `integration`: it starts processes or waits for real time to pass."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cpu_budget import within_cpu_budget

HERE = Path(__file__).parent
MAX_CPU_S = 30.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("integration")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with within_cpu_budget(item, MAX_CPU_S):
        return (yield)
