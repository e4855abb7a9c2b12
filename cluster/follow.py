"""Shows a job's log as it grows, until the job has ended."""

import base64
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from minpro_megatron.cluster.shell import Shell
from minpro_megatron.cluster.slurm_job import JobError, JobState, log_files, look_up

POD_POLL_S = 15.0
_BLOCK_BYTES = 256 * 1024
# slurmctld may be restarted during a job of several days.
_MAX_SILENCE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Seconds between two questions to the cluster. Slurm's controller answers all users, and sites limit how often one
    of them asks: the state is asked for every `state_s`, and in the first `soon_for_s`, when many jobs start or are
    refused, every `state_soon_s`. The log is a file, and is read every `log_s`."""

    state_s: float = 30.0
    state_soon_s: float = 10.0
    soon_for_s: float = 120.0
    log_s: float = 5.0

    def next_state(self, followed_s: float) -> float:
        """Seconds from one question about the state to the next, in a job that has been followed for so long."""
        return self.state_soon_s if followed_s < self.soon_for_s else self.state_s


HERE, OVER_SSH = Intervals(), Intervals(log_s=15.0)


class LogTail:
    """What has been added to the logs of all starts of a job since the last call."""

    def __init__(self, shell: Shell, folder: str, job_id: str, out: TextIO) -> None:
        self._shell, self._folder, self._job_id, self._out = shell, folder, job_id, out
        self._read: dict[str, int] = {}
        self._cut = b""

    def show_news(self) -> None:
        for path in log_files(self._shell, self._folder, self._job_id):
            while block := self._block(path):
                self._read[path] += len(block)
                text = self._cut + block
                # a multi-byte character may have been written partially
                whole = text.decode("utf-8", errors="ignore").encode()
                self._cut = text[len(whole) :] if text.startswith(whole) and len(text) - len(whole) < 4 else b""
                self._out.write(text.removesuffix(self._cut).decode("utf-8", errors="replace"))
        self._out.flush()

    def _block(self, path: str) -> bytes:
        begin = self._read.setdefault(path, 0)
        command = f"tail -c +{begin + 1} {shlex.quote(path)} | head -c {_BLOCK_BYTES} | base64"
        read = self._shell.run(command, warn=True)
        return base64.b64decode(read.stdout) if read.return_code == 0 else b""  # otherwise it is read the next time


def follow(
    shell: Shell,
    job_id: str,
    log_folder: str,
    out: TextIO = sys.stdout,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    intervals: Intervals = HERE,
) -> JobState:
    """Shows the log and changes of state until the job has ended; returns its last state. Raises JobError."""
    tail, shown, began = LogTail(shell, log_folder, job_id, out), "", time.monotonic()
    answered, next_state = began, began
    while True:
        state, now = None, time.monotonic()
        if now >= next_state:
            next_state = now + intervals.next_state(now - began)
            try:
                state, answered = look_up(shell, job_id, log_folder), now
            except JobError:
                if now - answered > _MAX_SILENCE_S:
                    raise
        if state is not None and state.has_ended:
            time.sleep(min(intervals.log_s, 0.5))  # the last lines arrive with the file system's delay
        tail.show_news()
        if state is not None and str(state) != shown:
            shown = str(state)
            say(f"job {job_id}: {shown}")
        if state is not None and state.has_ended:
            return state
        time.sleep(max(0.0, min(intervals.log_s, next_state - time.monotonic())))


def follow_state(
    look: Callable[[], JobState],
    job_id: str,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    poll_s: float = POD_POLL_S,
) -> JobState:
    """Reports changes of the job's state until it has ended; returns its last state. Raises JobError.

    A failed state has to be seen twice: a TrainJob also has it for a moment before its pods are started again."""
    shown, last, answered = "", "", time.monotonic()
    while True:
        try:
            state = look()
            answered = time.monotonic()
        except JobError:
            if time.monotonic() - answered > _MAX_SILENCE_S:
                raise
            time.sleep(poll_s)
            continue
        if str(state) != shown and (not state.has_ended or str(state) == last or state.has_succeeded):
            shown = str(state)
            say(f"job {job_id}: {shown}")
        if state.has_ended and (state.has_succeeded or str(state) == last):
            return state
        last = str(state)
        time.sleep(poll_s)
