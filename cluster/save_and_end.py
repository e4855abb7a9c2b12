"""Asks the run of a Slurm job to save and to end, by files on the cluster.

scancel leaves no time for that: Slurm sends SIGTERM, and kills after KillWait (30 s unless the cluster has another
value), which is less than a global step. So the trainer is asked through the run folder, as the launcher asks it, and
the job's script gets a mark, with which it does not start the job again.
"""

import shlex
from pathlib import PurePosixPath

import msgspec

from minpro_megatron.cluster.records import JobRecord
from minpro_megatron.cluster.shell import Shell
from minpro_megatron.cluster.slurm_job import JobError, JobState, no_restart_file
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.launch.resume import CONFIG_FILE
from minpro_megatron.launch.starts import PLAN, Plan, slurm_key
from minpro_megatron.launch.stopping import saves_on_request
from minpro_megatron.run_folder.early_end import STARTS, STOP_REQUEST, StopRequest

REQUEST = StopRequest(reason="requested by minpro cancel --save")


def request_save_and_end(shell: Shell, record: JobRecord, state: JobState) -> None:
    """The run of the running job ends after its global step in progress, with a checkpoint. Raises JobError if the
    cluster does not answer, and UserError for a job that cannot do this."""
    remedy = f"end job {record.job_id} without --save"
    if not record.jobs_folder:
        raise UserError(f"--save: job {record.job_id} was submitted by an earlier version: {remedy}")
    run_dir = PurePosixPath(record.run_dir)
    if state.state != "RUNNING":
        raise UserError(f"--save: job {record.job_id} is {state}, and only a running one can save: {remedy}")
    config = RunConfig.from_json(_shown(shell, "cat", run_dir / CONFIG_FILE, record))
    if not saves_on_request(config):
        raise UserError(
            f"--save: the run {record.name} saves nothing before its end (checkpoint.every_steps = 0 and "
            f"checkpoint.every_minutes = 0, or debug.trainer = timer): {remedy}"
        )
    listed = _shown(shell, "ls -1", run_dir / STARTS, record).split()
    start = run_dir / STARTS / str(max((int(name) for name in listed if name.isdecimal()), default=0))
    if msgspec.json.decode(_shown(shell, "cat", start / PLAN, record), type=Plan).key != slurm_key(
        record.job_id, state.restarts
    ):
        raise _not_begun(record)
    request, new = shlex.quote(str(start / STOP_REQUEST)), shlex.quote(str(start / f"{STOP_REQUEST}.new"))
    text = shlex.quote(msgspec.json.encode(REQUEST).decode())
    mark = shlex.quote(no_restart_file(record.jobs_folder, record.job_id))
    # The mark is there before the trainer can see the request, and does not stay without it: a job that runs on must
    # be started again after a failure.
    _run(shell, f"echo {text} > {new} && touch {mark} && {{ mv {new} {request} || {{ rm -f {mark}; false; }}; }}")


def _shown(shell: Shell, program: str, path: PurePosixPath, record: JobRecord) -> str:
    """What the program shows of a file or folder of the run."""
    shown = shell.run(f"{program} {shlex.quote(str(path))}", warn=True)
    if shown.return_code != 0 and "No such file" in shown.stderr:
        raise _not_begun(record)
    if shown.return_code != 0:
        raise JobError(f"{path}: {shown.stderr.strip()}")
    return shown.stdout


def _run(shell: Shell, command: str) -> None:
    done = shell.run(command, warn=True)
    if done.return_code != 0:
        raise JobError(done.stderr.strip() or f"exit status {done.return_code}: {command}")


def _not_begun(record: JobRecord) -> UserError:
    return UserError(
        f"--save: the present start of job {record.job_id} has not reached its run folder {record.run_dir} yet: wait, "
        "or end the job without --save"
    )
