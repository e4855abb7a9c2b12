"""End a submitted job without a restart. Submitting the same command again resumes its run.

minpro cancel NAME     (the run's name or the job's number)
"""

import argparse
import sys

from minpro_megatron.cluster import pods
from minpro_megatron.cluster.local_job import refuse_local
from minpro_megatron.cluster.records import recall, records_folder
from minpro_megatron.cluster.shell import shell_of
from minpro_megatron.cluster.slurm_job import JobError, cancel, look_up
from minpro_megatron.command_line import Parser
from minpro_megatron.errors import UserError, run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro cancel") -> int:
    parser = Parser(prog=prog, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("job", metavar="NAME", help="the run's name or the job's number")
    options = parser.parse_args(arguments)
    return run_reporting(lambda: _cancel(options))


def _cancel(options: argparse.Namespace) -> int:
    record = recall(records_folder(), options.job)
    refuse_local(record, "end it with Ctrl-C in the terminal where it was submitted")
    shell = shell_of(record.ssh_settings)
    try:
        state = pods.look_up(record) if record.is_of_pods else look_up(shell, record.job_id, record.log_folder)
        if state.has_ended:
            raise UserError(f"job {record.job_id} has ended already: {state}")
        pods.cancel(record) if record.is_of_pods else cancel(shell, record.job_id)
    except JobError as error:
        raise UserError(str(error)) from None
    print(f"job {record.job_id}: cancellation requested")
    return 0


if __name__ == "__main__":
    from minpro_megatron.__main__ import run_command

    sys.exit(run_command("cancel", sys.argv[1:], "python -m cluster.cancel"))
