"""A run submitted to this machine: it runs in the process of `submit`, whose record says how it ended."""

from pathlib import Path

from minpro_megatron.cluster.records import JobRecord, is_running
from minpro_megatron.cluster.slurm_job import JobState
from minpro_megatron.errors import UserError

LAST_LINES = 3


def local_state(record: JobRecord) -> JobState:
    """The state of the job in Slurm's words. A process that no longer exists and left no status was killed."""
    if record.exit_status is not None:
        return JobState(state="FAILED" if record.exit_status else "COMPLETED", exit_status=record.exit_status)
    if is_running(record.process_id, record.submitted_at):
        return JobState(state="RUNNING", nodes=f"this machine, process {record.process_id}")
    return JobState(state="FAILED", exit_status=1)


def trainer_log(record: JobRecord) -> list[str]:
    """The lines of the trainer's log; none before the trainer has started."""
    path = Path(record.run_dir) / "logs" / "train.log"
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def refuse_local(record: JobRecord, remedy: str) -> None:
    """Raises UserError for a job on this machine, which `submit` itself shows and ends."""
    if record.is_local:
        raise UserError(f"job {record.job_id} runs on this machine, in process {record.process_id}: {remedy}")
