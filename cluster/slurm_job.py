"""The state of a job as reported by Slurm, with or without accounting."""

import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from minpro_megatron.cluster.shell import Shell
from minpro_megatron.errors import TO_BE_CONTINUED, ProjectError

JOB_PREFIX = "minpro-"
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL",
          "DEADLINE", "REVOKED")  # fmt: skip
# What is said of a job that `has_saved`.
SAVED = "ended with a checkpoint; submit the same command again to resume"
# The last line of NeMo-Run's script.
_SCRIPT_END = re.compile(r"^job exited with code (\d+)$", re.MULTILINE)


class JobError(ProjectError):
    """The cluster does not answer, or has no such job."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job's state in Slurm's words. exit_status is that of its script: 128 + number after a signal."""

    state: str
    exit_status: int = 0
    reason: str = ""
    restarts: int = 0
    nodes: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def has_succeeded(self) -> bool:
        return self.state == "COMPLETED" and self.exit_status == 0

    @property
    def has_saved(self) -> bool:
        """Whether the run saved on a request or before its time limit, and the job ended for that. It is not finished
        and has not failed."""
        return self.has_ended and self.exit_status == TO_BE_CONTINUED

    def __str__(self) -> str:
        words = [self.state]
        if self.has_ended and not self.has_succeeded:
            words.append(f"(exit status {self.exit_status})")
        elif self.reason not in ("", "None"):
            words.append(f"({self.reason})")
        words += [f"on {self.nodes}"] if self.nodes else []
        words += [f"after {self.restarts} restart{'s' * (self.restarts > 1)}"] if self.restarts else []
        return " ".join(words)


def look_up(shell: Shell, job_id: str, log_folder: str) -> JobState:
    """The state of the job from slurmctld; after slurmctld has discarded it (MinJobAge) from the accounting, and
    without accounting from the job's own log. Raises JobError."""
    shown = shell.run(f"scontrol show job {shlex.quote(job_id)}", warn=True)
    if shown.return_code == 0 and "JobState=" in shown.stdout:
        return parse_scontrol(shown.stdout)
    if "Invalid job id" not in shown.stderr:
        raise JobError(f"scontrol: {shown.stderr.strip() or f'exit status {shown.return_code}'}")
    command = (
        f"sacct --noheader --parsable2 --allocations --format=State,ExitCode,NodeList --jobs={shlex.quote(job_id)}"
    )
    accounted = shell.run(command, warn=True)
    if accounted.return_code == 0 and accounted.stdout.strip():
        return parse_sacct(accounted.stdout)
    logged = shell.run(f"cat {shlex.quote(log_folder)}/sbatch_*_{shlex.quote(job_id)}.out", warn=True)
    state = parse_script_output(logged.stdout)
    if state is None:
        raise JobError(
            f"job {job_id}: Slurm has discarded it, there is no accounting, and {log_folder} does not say how it ended"
        )
    return state


def parse_scontrol(text: str) -> JobState:
    """The state in the output of `scontrol show job` for one job."""
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    return JobState(
        state=fields["JobState"],
        exit_status=_exit_status(fields.get("ExitCode", "0:0")),
        reason=fields.get("Reason", ""),
        restarts=int(fields.get("Restarts", 0)),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
    )


def parse_sacct(text: str) -> JobState:
    """The last start of the job, in sacct's State|ExitCode|NodeList."""
    state, exit_code, nodes = text.strip().splitlines()[-1].split("|")
    # "CANCELLED by 1000"
    return JobState(state=state.split()[0], exit_status=_exit_status(exit_code), nodes=nodes)


def parse_script_output(text: str) -> JobState | None:
    """How the last start ended according to its script's output; None if the output does not reach its end."""
    ends = _SCRIPT_END.findall(text)
    if not ends:
        return None
    status = int(ends[-1])
    return JobState(state="FAILED" if status else "COMPLETED", exit_status=status, restarts=len(ends) - 1)


def _exit_status(code: str) -> int:
    """Slurm's status:signal as a shell's status."""
    status, _, number = code.partition(":")
    return 128 + int(number) if number.strip("0") else int(status)


def job_name(name: str) -> str:
    """The job's name in Slurm, from the run's name."""
    return f"{JOB_PREFIX}{name}"


def active_jobs(shell: Shell, name: str) -> list[str]:
    """The user's jobs of this name that have not ended."""
    listed = shell.run(f"squeue --me --noheader --format=%i --name={shlex.quote(name)}", warn=True)
    if listed.return_code != 0:
        raise JobError(f"squeue: {listed.stderr.strip() or f'exit status {listed.return_code}'}")
    return listed.stdout.split()


def no_restart_file(jobs_folder: str, job_id: str) -> str:
    """The file whose existence tells the job's script not to start the job again."""
    return f"{jobs_folder}/no_restart_{job_id}"


def cancel(shell: Shell, job_id: str) -> None:
    """Ends the job at once, without a restart: its processes get SIGTERM, and are killed after Slurm's KillWait. Raises
    JobError."""
    ended = shell.run(f"scancel {shlex.quote(job_id)}", warn=True)
    if ended.return_code != 0:
        raise JobError(f"scancel: {ended.stderr.strip() or f'exit status {ended.return_code}'}")


def log_files(shell: Shell, folder: str, job_id: str) -> list[str]:
    """The logs of the job's starts, in their order."""
    pattern = f"{shlex.quote(folder)}/log-*_{shlex.quote(job_id)}_*.out"
    listed = shell.run(f"ls -1 {pattern} 2>/dev/null", warn=True).stdout.split("\n")
    return sorted(filter(None, listed), key=lambda path: int(PurePosixPath(path).stem.rpartition("_")[2]))
