"""A run submitted to this machine: it runs in the process of `submit`, whose record says how it ended."""

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil

from minpro_megatron.cluster.records import JobRecord, is_running
from minpro_megatron.cluster.slurm_job import JobState
from minpro_megatron.errors import UserError
from minpro_megatron.monitor.status import read_statuses

LAST_LINES = 3
_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),")


def local_state(record: JobRecord) -> JobState:
    """The state of the job in Slurm's words. A process that no longer exists and left no status was killed."""
    if record.exit_status is not None:
        return JobState(state="FAILED" if record.exit_status else "COMPLETED", exit_status=record.exit_status)
    if is_running(record.process_id, record.submitted_at):
        return JobState(state="RUNNING", nodes=f"this machine, process {record.process_id}")
    return JobState(state="FAILED", exit_status=1)


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """An interrupt (Ctrl-C) ends the processes that are started inside, with the signal on which a launcher ends its
    roles in order; afterwards this raises KeyboardInterrupt. NeMo-Run starts processes where Ctrl-C does not reach
    them, and after an interrupt it waits until they have ended by themselves."""
    before = {child.pid for child in psutil.Process().children()}
    interrupted = False

    def end(number: int, frame: object) -> None:
        nonlocal interrupted
        if not interrupted:
            print("interrupted: the job is ending", file=sys.stderr, flush=True)
        interrupted = True
        for child in psutil.Process().children():
            if child.pid not in before:
                child.terminate()

    previous = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted:
        raise KeyboardInterrupt


def trainer_log(record: JobRecord) -> list[str]:
    """The lines of the trainer's log; none before the trainer has started."""
    path = Path(record.run_dir) / "logs" / "train.log"
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def progress(record: JobRecord) -> list[str]:
    """What the roles of a running job do and for how long, and the last lines that its trainer has logged. What an
    earlier start of the run has left is not shown: a resumed run takes minutes until its first global step."""
    since = record.submitted_at
    statuses = {role: status for role, status in read_statuses(Path(record.run_dir)).items() if status.time >= since}
    now = time.time()
    doing = [f"{role}: {status.phase}, for {now - status.time:.0f} s" for role, status in statuses.items()]
    if not {"train", "timer"} & statuses.keys():  # of which every run has one, and which take longest to say anything
        doing.append("train: starting")
    return doing + _logged_since(since, trainer_log(record))[-LAST_LINES:]


def _logged_since(since: float, lines: list[str]) -> list[str]:
    """The lines from the first one with a time of `since` or later; earlier ones may have none."""
    for index, line in enumerate(lines):
        if (found := _TIME.match(line)) and datetime.fromisoformat(found.group(1)).timestamp() >= int(since):
            return lines[index:]
    return []


def refuse_local(record: JobRecord, remedy: str) -> None:
    """Raises UserError for a job on this machine, which `submit` itself shows and ends."""
    if record.is_local:
        raise UserError(f"job {record.job_id} runs on this machine, in process {record.process_id}: {remedy}")
