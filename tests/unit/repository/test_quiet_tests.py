"""A unit test that starts a process or sleeps is found out, however it does so."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from tests.support.quiet_tests import MAX_SLEEP_S, watched

pytest_plugins = ["pytester"]


def fork() -> None:
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def posix_spawn() -> None:
    child = os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], {})
    os.waitpid(child, 0)


def spawn() -> None:
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.kill()
    process.join()


def sleep_in_a_thread() -> None:
    thread = threading.Thread(target=time.sleep, args=(2 * MAX_SLEEP_S,))
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (lambda: subprocess.run(["true"], check=True), "subprocess.Popen"),
        (lambda: os.system("true"), "os.system"),
        (fork, "os.fork"),
        (posix_spawn, "os.posix_spawn"),
        (spawn, "multiprocessing"),
        (sleep_in_a_thread, "time.sleep(0.04)"),
        (lambda: time.sleep(1.5 * MAX_SLEEP_S), "time.sleep(0.03)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_breaks_the_limits_is_noted(act: Callable[[], object], found: str) -> None:
    with watched("a test") as breaches:
        act()
    assert breaches
    assert any(line.startswith(found) for line in breaches), breaches


def test_short_sleeps_and_what_happens_outside_are_not_noted() -> None:
    with watched("a test") as breaches:
        time.sleep(MAX_SLEEP_S / 4)
        with watched("another test"):
            subprocess.run(["true"], check=True)
    assert breaches == []


def test_a_unit_test_that_starts_a_process_fails_with_the_place(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.unit.conftest import pytest_runtest_call, pytest_runtest_protocol")
    pytester.makepyfile(
        """
        import subprocess
        import pytest

        @pytest.fixture
        def started():
            subprocess.run(["true"])

        def test_in_a_fixture(started): pass
        def test_itself(): subprocess.run(["true"])
        def test_nothing(): pass
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["a unit test starts no process*", "subprocess.Popen*:6"])
    result.stdout.fnmatch_lines(["a unit test starts no process*", "subprocess.Popen*:9"])
