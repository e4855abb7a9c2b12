"""The bytes of tensors that are alive, by device, phase and the line of code that allocated them."""

import inspect
import os
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minpro_megatron.rehearsal.record import Phase

_MAX_LINES = 24
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_OWN_FOLDER = str(Path(__file__).resolve().parent) + os.sep
_INSTALLED_IN = re.compile(r".*/site-packages/|.*/(?=transformer_engine/pytorch/)")
_NOT_CALLERS = (str(Path(torch.__file__).parent) + os.sep, _OWN_FOLDER, "<")


class LiveBytes:
    """Counts storages from their first appearance until they are released. Phases nest: a tensor counts in all that are
    open, and "update > optimizer" is a phase within "update"."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.interrupted: str | None = None  # the innermost phase that an exception has left
        self._open: list[Phase] = []
        self._live: Counter[str] = Counter()  # by device type
        self._lines: Counter[tuple[str, str]] = Counter()  # by device type and line
        self._known: dict[int, tuple[str, int, str]] = {}  # by storage: device type, bytes, line
        self._inside_kernel = 0
        self._new_peaks: set[tuple[str, str]] = set()  # (device type, open phase) whose peak lines are not yet taken

    @property
    def phase(self) -> str:
        return self._open[-1].name if self._open else "start"

    @contextmanager
    def in_phase(self, name: str) -> Iterator[Phase]:
        """Context manager: what happens inside belongs to the phase. A phase may be entered again."""
        self._take_peak_lines()
        if self._open and self.phase.endswith(f" > {name}"):  # already in it
            yield self._open[-1]
            return
        full = f"{self.phase} > {name}" if self._open else name
        phase = self.phases.setdefault(full, Phase(full))
        self._open.append(phase)
        for device, size in self._live.items():
            phase.entry[device] = max(size, phase.entry.get(device, 0))
        self._compare_with_peaks()
        try:
            yield phase
        except Exception:
            self.interrupted = self.interrupted or full
            raise
        finally:
            self._take_peak_lines()
            phase.left = {device: size for device, size in self._live.items() if size}
            phase.left_lines = {device: self._largest_lines(device) for device in phase.left}
            self._open.pop()

    @contextmanager
    def one_kernel(self) -> Iterator[None]:
        """Context manager: everything inside is one kernel, whose intermediate results take no memory."""
        self._inside_kernel += 1
        try:
            yield
        finally:
            self._inside_kernel -= 1
            self._compare_with_peaks()

    def see(self, tensor: Tensor) -> None:
        """Counts the tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._count(key, tensor.device.type, storage.nbytes())
        weakref.finalize(storage, self._release, key)

    @contextmanager
    def watching_resizes(self) -> Iterator[None]:
        """Context manager: storages that are emptied, and filled again, count as released and allocated."""
        kind: Any = torch.UntypedStorage
        original = kind.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result, key = original(storage, size), storage._cdata
            if key in self._known:
                device, _, _ = self._known[key]
                self._release(key)
                self._count(key, device, size)
            return result

        kind.resize_ = resize
        try:
            yield
        finally:
            kind.resize_ = original

    def _count(self, key: int, device: str, size: int) -> None:
        line = calling_line()
        self._known[key] = (device, size, line)
        self._live[device] += size
        self._lines[device, line] += size
        if not self._inside_kernel:
            self._compare_with_peaks()

    def _release(self, key: int) -> None:
        self._take_peak_lines()
        device, size, line = self._known.pop(key)
        self._live[device] -= size
        self._lines[device, line] -= size

    def _compare_with_peaks(self) -> None:
        for phase in self._open:
            for device, size in self._live.items():
                if size > phase.peak.get(device, 0):
                    phase.peak[device] = size
                    self._new_peaks.add((device, phase.name))

    def _take_peak_lines(self) -> None:
        """At a release after a new peak: to sort the lines at every new peak would take most of the time."""
        for device in {device for device, _ in self._new_peaks}:
            lines = self._largest_lines(device)
            for name in (name for other, name in self._new_peaks if other == device):
                self.phases[name].peak_lines[device] = lines
        self._new_peaks.clear()

    def _largest_lines(self, device: str) -> list[list[Any]]:
        found = [[line, size] for (other, line), size in self._lines.items() if other == device and size]
        return sorted(found, key=lambda one: -one[1])[:_MAX_LINES]


def calling_line(of_project: bool = False) -> str:
    """The line of code, outside torch and this folder, that is running: file:line function. `of_project`: the innermost
    one of this package, if there is one. In a backward pass it begins with the name of the autograd function."""
    frame, first = inspect.currentframe(), None
    while frame:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_CALLERS) and "contextlib" not in file and "functools" not in file:
            first = first or frame
            if not of_project or file.startswith(_PACKAGE):
                break
        frame = frame.f_back
    frame = frame or first
    if frame is None:
        line = "?"
    else:
        file = _INSTALLED_IN.split(frame.f_code.co_filename)[-1].removeprefix(str(Path(_PACKAGE).parent) + os.sep)
        line = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
    node = torch._C._current_autograd_node()
    return f"[backward {node.name()}] {line}" if node is not None else line
