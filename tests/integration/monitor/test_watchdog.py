"""A process that hangs ends with the stacks of its threads on disk; one that works is left alone."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from minpro_megatron.errors import HUNG
from minpro_megatron.monitor import watchdog as watchdog_module
from minpro_megatron.monitor.watchdog import Watchdog

TIMEOUT_S = 0.2
GRACE_S = 0.01
WAIT_S = 5.0


class Ended:
    """In the place of os._exit."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.happened = threading.Event()

    def __call__(self, status: int) -> None:
        self.statuses.append(status)
        self.happened.set()


@pytest.fixture
def ended() -> Ended:
    return Ended()


@pytest.fixture
def last_resort(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What faulthandler was asked for: here it would end the tests if the machine were slow."""
    asked: list[object] = []
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: asked.append("cancelled"))
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda timeout, exit, file: asked.append((timeout, exit)))
    return asked


@pytest.fixture
def watchdog(tmp_path: Path, ended: Ended, last_resort: list[object]) -> Iterator[Watchdog]:
    dog = Watchdog(tmp_path / "logs" / "stacks.txt", TIMEOUT_S, grace_s=GRACE_S, end=ended)
    yield dog
    dog.close()


def stacks(tmp_path: Path) -> str:
    return (tmp_path / "logs" / "stacks.txt").read_text()


def an_endless_update(ended: Ended) -> None:
    ended.happened.wait(WAIT_S)


def test_what_hangs_is_ended_with_its_stacks(
    tmp_path: Path,
    watchdog: Watchdog,
    ended: Ended,
    last_resort: list[object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = time.monotonic()
    with watchdog.guard("update 7 (global step 3)"):
        an_endless_update(ended)
    assert TIMEOUT_S <= time.monotonic() - start < WAIT_S
    assert ended.statuses == [HUNG]
    assert last_resort == [(pytest.approx(TIMEOUT_S + 2 * GRACE_S), True), "cancelled"]
    told = r"update 7 \(global step 3\) takes longer than debug.hang_timeout_s = 0.2 s; stacks of all threads"
    assert re.search(rf"^\d+-\d+-\d+ \d+:\d+:\d+ {told}:\n", stacks(tmp_path))
    assert "in an_endless_update" in stacks(tmp_path)
    assert re.fullmatch(rf"error: {told} in .*/logs/stacks.txt\n", capsys.readouterr().err)


def refuse() -> list[Path]:
    raise RuntimeError("no recorder")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (lambda: [Path("a"), Path("b")], "further record of the hang: a, b\n"),
        (refuse, "error: no further record of the hang: RuntimeError('no recorder')\n"),
    ],
)
def test_what_else_is_known_is_recorded_before_the_end(
    record: Callable[[], list[Path]],
    told: str,
    tmp_path: Path,
    ended: Ended,
    last_resort: list[object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    dog = Watchdog(tmp_path / "stacks.txt", TIMEOUT_S, grace_s=GRACE_S, end=ended, record=record)
    with dog.guard("update 7"):
        an_endless_update(ended)
    dog.close()
    assert ended.statuses == [HUNG]
    assert capsys.readouterr().err.endswith(f"stacks.txt\n{told}")


def test_what_ends_in_time_is_left_alone(
    tmp_path: Path, watchdog: Watchdog, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0  # a clock that does not run on while this machine is busy with something else
    clock = SimpleNamespace(monotonic=lambda: now, strftime=time.strftime)
    monkeypatch.setattr(watchdog_module, "time", clock)
    for number in range(4):  # together longer than the limit, each shorter
        with watchdog.guard(f"update {number}"):
            now += 0.9 * TIMEOUT_S
            time.sleep(TIMEOUT_S / 3)  # the watchdog looks every quarter of the limit
    now += 9 * TIMEOUT_S
    time.sleep(TIMEOUT_S / 2)  # nothing is guarded: waiting for rollouts may take as long as it takes
    assert ended.statuses == []
    assert stacks(tmp_path) == ""


def test_an_error_ends_the_guard(tmp_path: Path, watchdog: Watchdog, ended: Ended) -> None:
    with pytest.raises(ValueError, match="broken"), watchdog.guard("update 0"):
        raise ValueError("broken")
    time.sleep(1.5 * TIMEOUT_S)
    assert ended.statuses == []


def test_after_closing_nothing_is_watched(watchdog: Watchdog, ended: Ended) -> None:
    watchdog.close()
    with watchdog.guard("update 0"):
        time.sleep(1.5 * TIMEOUT_S)
    assert ended.statuses == []


def test_guards_do_not_nest(watchdog: Watchdog) -> None:
    with watchdog.guard("update 0"), pytest.raises(AssertionError, match=r"score: .*update 0"), watchdog.guard("score"):
        pass


def test_earlier_stacks_stay(tmp_path: Path) -> None:
    path = tmp_path / "stacks.txt"
    path.write_text("of an earlier incarnation\n")
    Watchdog(path, 100).close()
    assert path.read_text() == "of an earlier incarnation\n"


# In a process of its own: this time it really ends.
HANGING_PROCESS = """
import ctypes, sys, time
from pathlib import Path
from minpro_megatron.monitor.watchdog import Watchdog

def hang():
    if sys.argv[2] == "locked":
        # PyDLL keeps Python's lock while C sleeps: no other thread of Python runs
        ctypes.PyDLL(None).sleep(30)
    time.sleep(30)

# The last resort, which comes after twice the grace, must not be the first where Python can run.
grace_s = 0.05 if sys.argv[2] == "locked" else 0.5
with Watchdog(Path(sys.argv[1]), 0.1, grace_s).guard("update 1"):
    hang()
"""


@pytest.mark.parametrize(("how", "status"), [("waiting", HUNG), ("locked", 1)])
def test_the_process_ends_even_if_python_cannot_run(tmp_path: Path, how: str, status: int) -> None:
    path = tmp_path / "stacks.txt"
    done = subprocess.run(
        [sys.executable, "-c", HANGING_PROCESS, str(path), how], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == status
    assert "in hang" in path.read_text()
    if how == "waiting":
        assert "update 1 takes longer than debug.hang_timeout_s = 0.1 s" in done.stderr
