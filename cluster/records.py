"""This machine's records of the jobs that it has submitted: one file each, named after the run. While `submit` still
checks a run, the file of a `RunCheck` is beside them."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from minpro_megatron.cluster.sections import SshSettings
from minpro_megatron.command_line import did_you_mean
from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file


def records_folder() -> Path:
    """The folder of this machine's records of submitted jobs, next to NeMo-Run's experiments."""
    return Path(os.environ.get("NEMORUN_HOME", Path.home() / ".nemo_run")) / "minpro_jobs"


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job: the locations of its run and its logs, and how its cluster is reached. One that runs on this machine has
    the process in which it runs, and the exit status after its end."""

    name: str
    job_id: str
    run_dir: str
    log_folder: str
    submitted_at: float
    ssh: dict | None = None
    executor: str = "slurm"  # of jobs elsewhere than on this machine
    namespace: str = ""  # of Kubernetes
    jobs_folder: str = ""  # the profile's, for Slurm
    process_id: int | None = None
    exit_status: int | None = None

    @property
    def is_local(self) -> bool:
        return self.process_id is not None

    @property
    def is_of_pods(self) -> bool:
        """Whether Kubernetes or SkyPilot runs the job."""
        return self.executor in ("kubernetes", "skypilot")

    @property
    def ssh_settings(self) -> SshSettings | None:
        return None if self.ssh is None else SshSettings.model_validate(self.ssh)


class RunCheck(msgspec.Struct, frozen=True, kw_only=True):
    """A process of `submit` that checks a run before it submits its job."""

    name: str
    process_id: int
    began_at: float
    host: str = ""  # several login nodes may have the same home folder

    def __str__(self) -> str:
        since = time.time() - self.began_at
        return f"not submitted yet: minpro submit (process {self.process_id}) has been checking it for {since:.0f} s"


@contextmanager
def noted_check(folder: Path, name: str) -> Iterator[None]:
    """While this process is inside, and until it has stored the record of a job, the run is one that is checked."""
    check = RunCheck(name=name, process_id=os.getpid(), began_at=time.time(), host=platform.node())
    path = folder / name / f"{check.process_id}.check"
    replace_file(path, msgspec.json.encode(check).decode() + "\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def checks_under_way(folder: Path) -> list[RunCheck]:
    """Every run that a process of this machine checks now, oldest first. The files of processes that were killed are
    removed."""
    running = []
    for path in folder.glob("*/*.check"):
        try:
            check = msgspec.json.decode(path.read_bytes(), type=RunCheck)
        except FileNotFoundError:  # its process has ended since
            continue
        if check.host not in ("", platform.node()):
            continue
        if is_running(check.process_id, check.began_at):
            running.append(check)
        elif check.host:
            path.unlink(missing_ok=True)
    submitted = {record.name: record.submitted_at for record in all_records(folder)}
    waiting = [check for check in running if submitted.get(check.name, 0.0) < check.began_at]
    return sorted(waiting, key=lambda check: check.began_at)


def is_running(process_id: int | None, since: float) -> bool:
    """Whether the process that existed at that time still runs; a later one may have the same number."""
    try:
        return psutil.Process(process_id).create_time() <= since
    except psutil.NoSuchProcess:
        return False


def remember(folder: Path, record: JobRecord) -> None:
    """Stores the record; the latest record of a name replaces earlier ones."""
    text = msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"
    replace_file(folder / record.name / f"{record.job_id}.json", text)


def recall(folder: Path, job: str) -> JobRecord:
    """The record of a job by its number, or the latest one of a run's name. Raises UserError."""
    found = [record for record in all_records(folder) if job in (record.name, record.job_id)]
    if not found:
        for check in checks_under_way(folder):
            if check.name == job:
                raise UserError(f"job {job!r}: {check}")
        known = sorted({record.name for record in all_records(folder)})
        hint = did_you_mean(job, known)
        raise UserError(f"job {job!r}: not submitted from this machine{hint}; known: {', '.join(known) or 'none'}")
    return max(found, key=lambda record: record.submitted_at)


def all_records(folder: Path) -> list[JobRecord]:
    """Every record, oldest first."""
    found = [msgspec.json.decode(path.read_bytes(), type=JobRecord) for path in folder.glob("*/*.json")]
    return sorted(found, key=lambda record: record.submitted_at)
