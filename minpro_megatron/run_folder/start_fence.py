"""Decides which start of a run may write into its folder: only the newest, and none if the folder belongs to another
run.

File locks separate two starts only if the file system supports them between machines; some shared file systems have no
locks, or only locks per machine. Therefore every start writes `run_dir/starts/<incarnation>/owner.json` before it
changes anything else in the folder, and its processes look for a newer owner before each change that another start
relies on. A network file system may show the new owner some seconds late: what an older start writes until then could
also have been left by a killed start.
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
    """The owner of a start; `key` is unique among all starts of all runs."""

    key: str
    host: str
    pid: int


def take_over(run_dir: Path, incarnation: int) -> None:
    """Makes this start the owner of the run folder: older starts end as soon as they see it."""
    owner = Owner(key=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid())
    replace_file_in(run_dir, f"{STARTS}/{incarnation}/{_OWNER}", msgspec.json.encode(owner).decode() + "\n")


def state_end(run_dir: Path, incarnation: int) -> None:
    """Records that no process of this start can write any more. Does nothing if the start's folder does not exist."""
    try:
        (run_dir / STARTS / str(incarnation) / _ENDED).touch()
    except OSError as error:
        log.debug("the end of start %d is not recorded: %s", incarnation + 1, error)


def former_start_at_work(run_dir: Path, incarnation: int) -> tuple[int, Owner] | None:
    """The previous start, if it may still be running: it was made on another machine and has not recorded its end. A
    killed start does not record its end either. On this machine its processes have ended, or a lock stops this start.
    """
    for number in sorted(_numbers(run_dir), reverse=True):
        if number < incarnation and (owner := _owner(run_dir, number)) is not None:
            has_ended = (run_dir / STARTS / str(number) / _ENDED).exists()
            return None if has_ended or owner.host == socket.gethostname() else (number, owner)
    return None


class StartFence:
    """Checks that a start still owns the run folder. Create it when a process of the start begins."""

    def __init__(self, run_dir: Path, incarnation: int) -> None:
        self._run_dir, self._incarnation = Path(run_dir), incarnation
        # None: a role that was started manually, without a launcher
        self._owner = _owner(self._run_dir, incarnation)
        self._next_look = 0.0

    def check(self) -> None:
        """Raises RunBlocked, with a message of one line, once this start must not write any more: a newer start has
        taken over the folder, or the folder is gone or belongs to another run. A temporary error of the file system is
        ignored."""
        try:
            problem = self._problem()
        except OSError as error:
            log.warning("cannot check whether %s still belongs to this start: %s", self._run_dir, error)
            return
        if problem:
            raise RunBlocked(f"name = {self._run_dir.name}: {problem}") from None

    def look(self) -> None:
        """`check`, at most once per second: call it often."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            self.check()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Context manager: an error inside that is caused by the loss of the folder is replaced by RunBlocked."""
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
                return f"{run_dir} is gone: it was removed or renamed while start {number} of the run was running"
            if found != self._owner:
                return (
                    f"{run_dir} belongs to another run now: the folder was removed or replaced while start {number} "
                    "of the run was running"
                )
        newer = max((n for n in _numbers(run_dir) if n > self._incarnation and _owner(run_dir, n)), default=None)
        owner = None if newer is None else _owner(run_dir, newer)
        if newer is None or owner is None:
            return ""
        return (
            f"start {newer + 1} of the run (on {owner.host}) has taken over {run_dir} from this one (start {number}), "
            "which stops writing; if both should run, give one of them another name=..."
        )


def _owner(run_dir: Path, incarnation: int) -> Owner | None:
    """The owner of a start; None for a start that was refused before it changed anything, or has not written it yet."""
    try:
        return msgspec.json.decode((run_dir / STARTS / str(incarnation) / _OWNER).read_bytes(), type=Owner)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _numbers(run_dir: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(run_dir / STARTS) if name.isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
