"""This machine's records of the jobs that it has submitted: one file each, named after the run."""

import os
from pathlib import Path

import msgspec

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


def remember(folder: Path, record: JobRecord) -> None:
    """Stores the record; the latest record of a name replaces earlier ones."""
    text = msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"
    replace_file(folder / record.name / f"{record.job_id}.json", text)


def recall(folder: Path, job: str) -> JobRecord:
    """The record of a job by its number, or the latest one of a run's name. Raises UserError."""
    found = [record for record in all_records(folder) if job in (record.name, record.job_id)]
    if not found:
        known = sorted({record.name for record in all_records(folder)})
        hint = did_you_mean(job, known)
        raise UserError(f"job {job!r}: not submitted from this machine{hint}; known: {', '.join(known) or 'none'}")
    return max(found, key=lambda record: record.submitted_at)


def all_records(folder: Path) -> list[JobRecord]:
    """Every record, oldest first."""
    found = [msgspec.json.decode(path.read_bytes(), type=JobRecord) for path in folder.glob("*/*.json")]
    return sorted(found, key=lambda record: record.submitted_at)
