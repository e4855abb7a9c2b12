"""Limits of a unit test: it starts no process and does not sleep.

A process that a test starts costs it most of its time, depends on the load of the machine, and may outlive it. Tests
that need one are in tests/integration/.
"""

import multiprocessing.util
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

# What the interpreter reports when a process is started. `multiprocessing` starts those of its methods "spawn" and
# "forkserver" without a report: see `_watch_multiprocessing`.
STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"})
MAX_SLEEP_S = 0.02

_test: str | None = None  # the one that runs now
_breaches: list[str] = []
_is_installed = False


@contextmanager
def watched(test: str) -> Iterator[list[str]]:
    """Within: what breaks the limits is added to the list, a line each, wherever in this process it happens.

    Processes are still started, and sleeps still last their time: what the test finds out does not change.
    """
    global _test, _breaches
    _install()
    outer = _test, _breaches
    _test, _breaches = test, []
    try:
        yield _breaches
    finally:
        _test, _breaches = outer


def _note(what: str) -> None:
    if _test is None:
        return
    places = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
    place = next((frame for frame in reversed(places[:-2]) if "/lib/python" not in frame.filename), places[0])
    _breaches.append(f"{what} at {place.filename}:{place.lineno}")


def _install() -> None:
    """Once in a process: an audit hook cannot be removed."""
    global _is_installed
    if _is_installed:
        return
    _is_installed = True
    sys.addaudithook(_audit)
    _watch_multiprocessing()
    _watch_sleeps()


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event in STARTS:
        _note(f"{event} {arguments[:1]}" if arguments else event)


def _watch_multiprocessing() -> None:
    spawn = multiprocessing.util.spawnv_passfds

    def noted(path: bytes, args: list[str], passfds: list[int]) -> int:
        _note("multiprocessing")
        return spawn(path, args, passfds)

    multiprocessing.util.spawnv_passfds = noted


def _watch_sleeps() -> None:
    sleep = time.sleep

    def noted(seconds: float, /) -> None:
        if seconds > MAX_SLEEP_S:
            _note(f"time.sleep({seconds:g})")
        sleep(seconds)

    time.sleep = noted
