"""Seconds of phases add up, belong to one lap, and the trace and the watchdog see the same phase."""

import time
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from minpro_megatron.monitor.phases import PhaseClock
from minpro_megatron.monitor.trace import NoTracer
from minpro_megatron.monitor.watchdog import Watchdog


class Spans(NoTracer):
    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def span(self, name: str):
        self.seen.append(name)
        yield


def test_a_lap_has_the_seconds_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = PhaseClock(("train", "publish"))
    for name, seconds in (("train", 3.0), ("publish", 1.0), ("train", 2.0)):
        with clock.phase(name):
            now += seconds
        now += 0.5
    assert clock.lap() == ({"train": 5.0, "publish": 1.0}, 7.5)
    with clock.phase("publish"):
        now += 4.0
    assert clock.lap() == ({"train": 0.0, "publish": 4.0}, 4.0)
    assert clock.seconds == {"train": 5.0, "publish": 5.0}


class Guards(Watchdog):
    def __init__(self, path: Path) -> None:
        super().__init__(path, timeout_s=600)
        self.seen: list[str] = []

    def guard(self, what: str) -> AbstractContextManager[None]:
        self.seen.append(what)
        return super().guard(what)


def test_the_trace_and_the_watchdog_see_the_phase(tmp_path: Path) -> None:
    spans, guards = Spans(), Guards(tmp_path / "stacks")
    clock = PhaseClock(("train", "wait"), spans, guards)
    with clock.phase("wait"):  # not guarded: it may take as long as it takes
        pass
    with clock.phase("train"):
        with clock.guard("update 6"):
            pass
        with clock.guard("update 7"):
            pass
    with clock.phase("train", guarded="update 8"), pytest.raises(AssertionError, match="update 8"), clock.guard("more"):
        pass
    guards.close()
    assert spans.seen == ["wait", "train", "train"]
    assert guards.seen == ["update 6", "update 7", "update 8", "more"]


def test_an_unknown_phase_is_an_error() -> None:
    clock = PhaseClock(("train",))
    with pytest.raises(KeyError), clock.phase("trian"):
        pass
