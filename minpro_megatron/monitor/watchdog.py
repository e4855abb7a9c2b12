"""Ends a process that hangs, after writing the stacks of its threads."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minpro_megatron.errors import HUNG

# Ranks that wait for each other detect the hang at about the same time. The first one must not end the role before the
# others have written their stacks.
GRACE_S = 10.0


class Watchdog:
    """Limits the time of the blocks inside `guard`. After the limit the stacks of all threads are written to `path`,
    and the process ends.

    A thread checks the time. If a hung library holds Python's global lock, this thread cannot run: then faulthandler,
    which does not need the lock, writes the stacks and ends the process after twice the grace period. Guards do not
    nest; only one thread may use an object.
    """

    def __init__(
        self,
        path: Path,
        timeout_s: float,
        grace_s: float = GRACE_S,
        end: Callable[[int], None] = os._exit,
        record: Callable[[], Sequence[Path]] = tuple,
    ) -> None:
        """`record` writes what else is known of the hang, after the stacks; it returns the files."""
        self._path = Path(path)
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._end = end
        self._record = record
        self._guarded: tuple[str, float] | None = None  # description of the block, and its deadline
        self._closed = threading.Event()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Applies the time limit to the block; `what` describes it in the error."""
        assert self._guarded is None, f"{what}: {self._guarded} is being guarded"
        self._guarded = (what, time.monotonic() + self._timeout_s)
        faulthandler.dump_traceback_later(self._timeout_s + 2 * self._grace_s, exit=True, file=self._file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._guarded = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        interval_s = min(1.0, self._timeout_s / 4)
        while not self._closed.wait(interval_s):
            guarded = self._guarded
            if guarded is None or time.monotonic() < guarded[1]:
                continue
            line = f"{guarded[0]} takes longer than debug.hang_timeout_s = {self._timeout_s:g} s; stacks of all threads"
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}:\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.flush()
            print(f"error: {line} in {self._path}", file=sys.stderr, flush=True)
            self._write_record()
            self._closed.wait(self._grace_s)
            self._end(HUNG)
            return

    def _write_record(self) -> None:
        try:
            files = ", ".join(map(str, self._record()))
        except Exception as error:  # whatever it is, the process must end
            print(f"error: no further record of the hang: {error!r}", file=sys.stderr, flush=True)
        else:
            if files:
                print(f"further record of the hang: {files}", file=sys.stderr, flush=True)
