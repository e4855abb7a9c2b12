"""What this machine remembers of the jobs that it has submitted: a file each, by the name of the run."""

import os
from pathlib import Path

import msgspec

from cluster.profile import SshSettings
from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file


def records_folder() -> Path:
    """Where this machine remembers the jobs that it has submitted: beside NeMo-Run's experiments."""
    return Path(os.environ.get("NEMORUN_HOME", Path.home() / ".nemo_run")) / "minpro_jobs"


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job: where its run and its logs are, and how its cluster is reached."""

    name: str
    job_id: str
    run_dir: str
    log_folder: str
    submitted_at: float
    ssh: dict | None = None

    @property
    def ssh_settings(self) -> SshSettings | None:
        return None if self.ssh is None else SshSettings.model_validate(self.ssh)


def remember(folder: Path, record: JobRecord) -> None:
    """Stores the record; the latest of a name is what the name stands for."""
    text = msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"
    replace_file(folder / record.name / f"{record.job_id}.json", text)


def recall(folder: Path, job: str) -> JobRecord:
    """The record of a job by its number, or by its run's name: the one submitted last. Raises UserError."""
    found = [record for record in all_records(folder) if job in (record.name, record.job_id)]
    if not found:
        known = sorted({record.name for record in all_records(folder)})
        raise UserError(f"job {job!r}: not submitted from this machine; known: {', '.join(known) or 'none'}")
    return max(found, key=lambda record: record.submitted_at)


def all_records(folder: Path) -> list[JobRecord]:
    """Every record, oldest first."""
    found = [msgspec.json.decode(path.read_bytes(), type=JobRecord) for path in folder.glob("*/*.json")]
    return sorted(found, key=lambda record: record.submitted_at)
