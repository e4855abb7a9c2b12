"""Show the state of a submitted job.

    minpro status NAME     (the run's name or the job's number; without it: all jobs submitted from here)

Exit status: 0 while the run is checked, while its job waits or runs, and if it has completed or has
saved, 1 if the named job has failed, 2 for errors.
"""

import argparse
import sys
from pathlib import PurePosixPath

from minpro_megatron.cluster import pods
from minpro_megatron.cluster.local_job import local_state, progress
from minpro_megatron.cluster.records import JobRecord, all_records, checks_under_way, recall, records_folder
from minpro_megatron.cluster.shell import Shell, shell_of
from minpro_megatron.cluster.slurm_job import SAVED, JobError, JobState, look_up
from minpro_megatron.command_line import Parser
from minpro_megatron.errors import UserError, run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro status") -> int:
    parser = Parser(prog=prog, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("job", nargs="?", metavar="NAME", help="the run's name or the job's number")
    options = parser.parse_args(arguments)
    return run_reporting(lambda: _status(options))


def _status(options: argparse.Namespace) -> int:
    folder = records_folder()
    checks = [check for check in checks_under_way(folder) if options.job in (None, check.name)]
    for check in checks:
        print(f"{check.name}  {check}")
    records = all_records(folder)
    if options.job and checks and options.job not in {record.name for record in records}:
        return 0
    if options.job:
        records = [recall(folder, options.job)]
    failed = False
    for record in records:
        shell = shell_of(record.ssh_settings)
        try:
            state = _state(record, shell)
        except JobError as error:
            if options.job:
                raise UserError(str(error)) from None
            print(f"{record.name}  job {record.job_id}: {error}")
            continue
        failed |= state.has_ended and not (state.has_succeeded or state.has_saved)
        for line in status_lines(record, state, shell):
            print(line)
    return int(failed and options.job is not None and not checks)


def _state(record: JobRecord, shell: Shell) -> JobState:
    if record.is_local:
        return local_state(record)
    return pods.look_up(record) if record.is_of_pods else look_up(shell, record.job_id, record.log_folder)


def status_lines(record: JobRecord, state: JobState, shell: Shell) -> list[str]:
    """The job's state and, if it is running, its progress or the last lines of its log."""
    shown = SAVED if state.has_saved else state
    lines = [f"{record.name}  job {record.job_id}: {shown}; run in {PurePosixPath(record.run_dir)}"]
    if state.state == "RUNNING" and record.is_local:
        lines += [f"  {line}" for line in progress(record)]
    elif state.state == "RUNNING" and not record.is_of_pods:
        command = f"tail -qn 3 {record.log_folder}/log-*_{record.job_id}_{state.restarts}.out"
        lines += [f"  {line}" for line in shell.run(command, warn=True).stdout.splitlines()]
    return lines


if __name__ == "__main__":
    from minpro_megatron.__main__ import run_command

    sys.exit(run_command("status", sys.argv[1:], "python -m cluster.status"))
