"""Which start of a run may write into its folder: the newest one, and none if the folder is no longer the run's.

Locks keep two starts apart where the file system has them between machines; some shared file systems have none, or hold
them on each machine alone. So every start leaves a mark in `run_dir/starts/<incarnation>/owner.json` before it changes
anything else in the folder, and the processes of a start look for a newer mark before each change that another start
would rely on. A network file system may show the mark some seconds late: what an older start has written until then is
what a killed one might have left too.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from minpro_megatron.errors import RunBlocked
from minpro_megatron.files.replacement import replace_file_in
from minpro_megatron.run_folder.early_end import STARTS

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # the run folder may be on a shared file system
_OWNER, _ENDED = "owner.json", "ended"


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Who made a start: `key` differs from that of any other start of any run."""

    key: str
    host: str
    pid: int


def take_over(run_dir: Path, incarnation: int) -> None:
    """From now on the run folder is this start's: older ones end as soon as they see it."""
    owner = Owner(key=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid())
    replace_file_in(run_dir, f"{STARTS}/{incarnation}/{_OWNER}", msgspec.json.encode(owner).decode() + "\n")


def state_end(run_dir: Path, incarnation: int) -> None:
    """No process of this start is left that could still write. Nothing happens if the start's folder is gone."""
    try:
        (run_dir / STARTS / str(incarnation) / _ENDED).touch()
    except OSError as error:
        log.debug("the end of start %d is not recorded: %s", incarnation + 1, error)


def former_start_at_work(run_dir: Path, incarnation: int) -> tuple[int, Owner] | None:
    """The start before this one, if it may still be at work: it was made on another machine and has not stated its end,
    as one that was killed has not either. On this machine its processes have ended, or a lock keeps this start away."""
    for number in sorted(_numbers(run_dir), reverse=True):
        if number < incarnation and (owner := _owner(run_dir, number)) is not None:
            has_ended = (run_dir / STARTS / str(number) / _ENDED).exists()
            return None if has_ended or owner.host == socket.gethostname() else (number, owner)
    return None


class StartFence:
    """One start's view of the run folder. Make it when a process of the start begins."""

    def __init__(self, run_dir: Path, incarnation: int) -> None:
        self._run_dir, self._incarnation = Path(run_dir), incarnation
        # None: a role that was started by hand, without a launcher
        self._owner = _owner(self._run_dir, incarnation)
        self._next_look = 0.0

    def check(self) -> None:
        """Raises RunBlocked, whose message is one line, once this start may write no more: a newer start has taken the
        folder over, or the folder is gone or another run's. A file system that fails for a moment does not count."""
        try:
            problem = self._problem()
        except OSError as error:
            log.warning("whether %s is still this start's cannot be seen: %s", self._run_dir, error)
            return
        if problem:
            raise RunBlocked(f"name = {self._run_dir.name}: {problem}") from None

    def look(self) -> None:
        """`check`, once a second at most: call it often."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            self.check()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """An error within that comes from the loss of the folder is reported as that: RunBlocked in its place."""
        try:
            yield
        except Exception:
            self.check()
            raise

    def _problem(self) -> str:
        run_dir, number = self._run_dir, self._incarnation + 1
        if self._owner is not None:
            found = _owner(run_dir, self._incarnation)
            if found is None and not (run_dir / STARTS).is_dir():
                return f"{run_dir} is gone: it was removed or renamed while start {number} of the run was at work"
            if found != self._owner:
                return (
                    f"{run_dir} belongs to another run now: the folder was removed or replaced while start {number} "
                    "of the run was at work"
                )
        newer = max((n for n in _numbers(run_dir) if n > self._incarnation and _owner(run_dir, n)), default=None)
        owner = None if newer is None else _owner(run_dir, newer)
        if newer is None or owner is None:
            return ""
        return (
            f"start {newer + 1} of the run (on {owner.host}) has taken {run_dir} over from this one (start {number}), "
            "which writes nothing more; if both were meant to run, give one of them another name=..."
        )


def _owner(run_dir: Path, incarnation: int) -> Owner | None:
    """The mark of a start; None for one that was refused before it changed anything, or that has none yet."""
    try:
        return msgspec.json.decode((run_dir / STARTS / str(incarnation) / _OWNER).read_bytes(), type=Owner)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _numbers(run_dir: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(run_dir / STARTS) if name.isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
