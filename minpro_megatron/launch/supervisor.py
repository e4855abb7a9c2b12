"""Starts the roles, monitors them, and stops all of them as soon as one fails."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from minpro_megatron.errors import FAILED, INTERRUPTED, SUCCEEDED, TO_BE_CONTINUED, WRONG_INPUT
from minpro_megatron.launch.prctl import adopt_orphans, ending_with_this_process
from minpro_megatron.launch.processes import descendants, kill_all, reap_orphans
from minpro_megatron.launch.stopping import Stopping
from minpro_megatron.monitor.rank_failures import FOLDER_VARIABLE, RankFailure, first_rank_failure
from minpro_megatron.run_folder.early_end import EarlyEnd

_POLL_S = 0.1
_REAP_EVERY_S = 5.0
_FAILURES_TOGETHER_S = 1.0
_TERMINATE_LIMIT_S = 6.0  # from SIGTERM to SIGKILL
_KILL_LIMIT_S = 6.0
_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class RoleCommand:
    """How to start one role; `stays`: it serves the others and is stopped once they are done. `log_name`: the name
    of its log, if it is not the role's name (a role on several nodes has several logs)."""

    role: str
    arguments: list[str]
    environment: dict[str, str]
    stays: bool = False
    log_name: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A role that ended when it should not have. `how` completes the sentence "the role <role> ..."."""

    role: str
    how: str
    log_file: Path
    log_start: int = 0  # bytes of earlier starts in it
    first_rank: RankFailure | None = None  # of a role with ranks: the rank that failed first, if it could report it
    needs_a_person: bool = False  # a restart would fail in the same way


@dataclass(slots=True)
class Outcome:
    """How the run ended: its status code, the roles that failed first, processes that could not be ended. `early_end`:
    the checkpoint with which the trainer ended this start before the run's end."""

    status: int
    failures: list[Failure] = field(default_factory=list)
    interrupted_by: str | None = None
    early_end: EarlyEnd | None = None
    left_behind: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Running:
    command: RoleCommand
    process: subprocess.Popen[bytes]
    log_file: Path
    log_start: int
    rank_failures: Path


class Supervisor:
    """Runs the roles to their end; use once, from the main thread.

    The run is finished when every role that does not stay has exited with 0; the staying ones then get
    SIGTERM. If any role ends otherwise, or this process gets SIGINT, SIGTERM or SIGHUP, all processes get SIGTERM
    and 6 s later SIGKILL, including those that the roles started. A further signal skips the 6 s. If this process
    itself is killed, the kernel signals the roles to end.

    `stopping` may let the roles continue for some time after the first signal, for a last checkpoint, and reports when
    the trainer has ended this start early; then all processes are stopped as well.
    """

    def __init__(
        self,
        commands: Sequence[RoleCommand],
        log_dir: Path,
        stopping: Stopping | None = None,
        *,
        poll_s: float = _POLL_S,
        failures_together_s: float = _FAILURES_TOGETHER_S,
    ) -> None:
        self._poll_s = poll_s
        self._failures_together_s = failures_together_s
        self._commands = commands
        self._log_dir = log_dir
        self._stopping = stopping
        self._stop_at: float | None = None  # after a signal; on the monotonic clock
        self._running: list[_Running] = []
        self._signals: list[signal.Signals] = []
        self._not_ours: set[int] = set()

    def run(
        self, each_tick: Callable[[], None] = lambda: None, others_are_done: Callable[[], bool] = lambda: True
    ) -> Outcome:
        """Starts the roles, calls `each_tick` ten times a second, returns when no process is left.

        `others_are_done`: the staying roles run until it returns True (roles on other nodes)."""
        with ExitStack() as stack:
            for number in _INTERRUPTIONS:
                previous = signal.signal(number, self._on_signal)
                stack.callback(signal.signal, number, previous)
            self._not_ours = {child.pid for child in psutil.Process().children()}
            adopt_orphans()
            outcome = Outcome(FAILED)
            try:
                for command in self._commands:
                    self._start(command)
                outcome = self._watch(each_tick, others_are_done)
            finally:  # also after an exception in each_tick: no process may remain
                outcome.left_behind = self._stop()
            return outcome

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signals.append(signal.Signals(number))

    def _start(self, command: RoleCommand) -> None:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log_file = self._log_dir / f"{command.log_name or command.role}.log"
        rank_failures = (self._log_dir / "failures" / log_file.stem).absolute()
        shutil.rmtree(rank_failures, ignore_errors=True)  # those of an earlier start
        with log_file.open("ab") as log:
            log_start = log.tell()
            process = subprocess.Popen(
                command.arguments,
                env=command.environment | {FOLDER_VARIABLE: str(rank_failures)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal then reaches only the launcher, which decides
                preexec_fn=ending_with_this_process(signal.SIGTERM),
            )
        self._running.append(_Running(command, process, log_file, log_start, rank_failures))

    def _watch(self, each_tick: Callable[[], None], others_are_done: Callable[[], bool]) -> Outcome:
        next_reaping = time.monotonic() + _REAP_EVERY_S
        while True:
            if ended := self._ended_early():
                return ended
            if self._signals and self._must_stop_now():
                # the trainer may just have saved
                return self._ended_early(at_once=True) or Outcome(INTERRUPTED, interrupted_by=self._interrupted_by)
            if self._failures():
                if ended := self._ended_early(at_once=True):  # other nodes have stopped their roles before this one
                    return ended
                # One failure makes other roles fail immediately. The order of detection is random, so all of them are
                # reported.
                time.sleep(self._failures_together_s)
                failures = self._failures()
                return Outcome(_status_of(failures), failures, interrupted_by=self._interrupted_by)
            own_are_done = all(r.process.returncode == 0 for r in self._running if not r.command.stays)
            if own_are_done and others_are_done():
                return Outcome(SUCCEEDED)
            each_tick()
            if time.monotonic() > next_reaping:
                reap_orphans(self._own_pids() | self._not_ours)
                next_reaping = time.monotonic() + _REAP_EVERY_S
            time.sleep(self._poll_s)

    @property
    def _interrupted_by(self) -> str | None:
        return self._signals[0].name if self._signals else None

    def _must_stop_now(self) -> bool:
        """Whether the time for a last checkpoint after the first signal is over, or a second signal has arrived."""
        if self._stop_at is None:
            allowed_s = self._stopping.allowed_s(self._signals[0].name) if self._stopping else 0.0
            self._stop_at = time.monotonic() + allowed_s
        return len(self._signals) > 1 or time.monotonic() >= self._stop_at

    def _ended_early(self, at_once: bool = False) -> Outcome | None:
        end = self._stopping.early_end(at_once) if self._stopping else None
        if end is None:
            return None
        return Outcome(TO_BE_CONTINUED, interrupted_by=self._interrupted_by, early_end=end)

    def _failures(self) -> list[Failure]:
        return [failure for running in self._running if (failure := _failure_of(running))]

    def _stop(self) -> list[int]:
        """Ends every process that this run has started; returns the pids of those that could not be ended."""
        signals_before = len(self._signals)
        signaled = self._terminate(set())
        deadline = time.monotonic() + _TERMINATE_LIMIT_S
        while descendants(self._not_ours) and time.monotonic() < deadline:
            if len(self._signals) > signals_before:
                break  # a second Ctrl-C: stop waiting
            time.sleep(self._poll_s)
            signaled = self._terminate(signaled)
        try:
            return kill_all(self._own_pids(), self._not_ours, _KILL_LIMIT_S)
        finally:
            for running in self._running:
                running.process.poll()

    def _terminate(self, signaled: set[int]) -> set[int]:
        """Sends SIGTERM once to the roles and to orphans adopted since; a living role ends its own children.

        Returns the pids that have been signaled so far.
        """
        for child in psutil.Process().children():
            if child.pid not in self._not_ours | signaled:
                try:
                    child.terminate()
                except psutil.NoSuchProcess:
                    continue
                signaled = signaled | {child.pid}
        return signaled

    def _own_pids(self) -> set[int]:
        return {running.process.pid for running in self._running}


def _status_of(failures: Sequence[Failure]) -> int:
    """The exit status of a run with these failures; a job is not started again for WRONG_INPUT."""
    return WRONG_INPUT if any(failure.needs_a_person for failure in failures) else FAILED


def _failure_of(running: _Running) -> Failure | None:
    status = running.process.poll()
    if status is None or (status == 0 and not running.command.stays):
        return None
    if status < 0:
        hint = " (as the kernel does when memory runs out)" if -status == signal.SIGKILL else ""
        how = f"was ended by signal {_signal_name(-status)}{hint}"
    elif status == 0:
        how = "exited before the others were done (exit status 0)"
    else:
        how = f"failed with exit status {status}"
    first_rank = first_rank_failure(running.rank_failures)
    needs_a_person = WRONG_INPUT in (status, first_rank.exit_status if first_rank else None)
    return Failure(running.command.role, how, running.log_file, running.log_start, first_rank, needs_a_person)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
