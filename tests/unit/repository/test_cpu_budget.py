"""A test that takes more processor time than its tier allows fails, unless it is marked `long`; waiting costs none."""

import threading

import pytest

from tests.support.cpu_budget import cpu_s, within_cpu_budget


def compute(seconds: float) -> None:
    end = cpu_s() + seconds
    while cpu_s() < end:
        pass


def test_processor_time_counts(request: pytest.FixtureRequest) -> None:
    over = pytest.raises(pytest.fail.Exception, match=r"the test took 0\.\d s of processor time, 0.02 s at most")
    with over, within_cpu_budget(request.node, 0.02):
        compute(0.1)
    with within_cpu_budget(request.node, 0.2):
        compute(0.02)


@pytest.mark.long
def test_a_long_test_may_take_more(request: pytest.FixtureRequest) -> None:
    with within_cpu_budget(request.node, 0.02):
        compute(0.1)


def test_waiting_is_no_processor_time(request: pytest.FixtureRequest) -> None:
    with within_cpu_budget(request.node, 0.1):
        assert not threading.Event().wait(0.2)
