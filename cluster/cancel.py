"""End a submitted job without a restart. Submitting the same command again resumes its run.

    minpro cancel NAME            (the run's name or the job's number)
    minpro cancel NAME --save     after the global step in progress, with a checkpoint

Without --save the run resumes from its last checkpoint: what came after it is computed again.
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
    parser.add_argument(
        "--save", action="store_true", help="let the global step in progress end and save first (Slurm only)"
    )
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
        if options.save and record.is_of_pods:
            raise UserError(
                f"--save: job {record.job_id} runs on {record.executor}, where its run folder cannot be reached from "
                "here: end it without --save"
            )
        if options.save:
            from minpro_megatron.cluster.save_and_end import request_save_and_end

            request_save_and_end(shell, record, state)
            print(f"job {record.job_id}: ends after the global step in progress and its checkpoint")
            print(f"minpro logs {record.name} --follow shows it; minpro cancel {record.name} ends it at once")
            return 0
        pods.cancel(record) if record.is_of_pods else cancel(shell, record.job_id)
    except JobError as error:
        raise UserError(str(error)) from None
    print(f"job {record.job_id}: cancellation requested")
    return 0


if __name__ == "__main__":
    from minpro_megatron.__main__ import run_command

    sys.exit(run_command("cancel", sys.argv[1:], "python -m cluster.cancel"))
