"""Meters for checks on a CPU: one counts real bytes of tensors, the other reports given figures."""

from collections.abc import Callable
from typing import Any

import torch

from minpro_megatron.gpu_checks.meter import Meter
from tests.mesh.live_bytes import LiveBytes


class LiveMeter(Meter):
    """Counts the bytes of the tensors that the work makes."""

    def peak_bytes(self, work: Callable[[], object]) -> int:
        with LiveBytes() as live:
            work()
        return live.peak


class GivenMeter(Meter):
    """Reports what it was given, after it has done the work; `held` and `reserved` are reported call by call."""

    def __init__(
        self,
        held: list[int] | None = None,
        peak: int | None = None,
        waits: int | None = None,
        reserved: list[int] | None = None,
    ) -> None:
        super().__init__(torch.device("cpu"))
        self._held, self._peak, self._waits, self._reserved = held or [], peak, waits, reserved or []

    def held_bytes(self) -> int | None:
        return self._held.pop(0) if self._held else None

    def reserved_bytes(self) -> int | None:
        return self._reserved.pop(0) if self._reserved else None

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        work()
        return self._peak

    def host_waits(self, work: Callable[[], object]) -> int | None:
        work()
        return self._waits

    def seconds(self, work: Callable[[], Any]) -> float:
        super().seconds(work)
        return 1.0
