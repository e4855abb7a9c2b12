"""Show the log of a submitted job, of all its starts.

minpro logs NAME [--follow]
"""

import argparse
import sys

from minpro_megatron.cluster import pods
from minpro_megatron.cluster.follow import HERE, OVER_SSH, LogTail, follow
from minpro_megatron.cluster.local_job import refuse_local, trainer_log
from minpro_megatron.cluster.records import recall, records_folder
from minpro_megatron.cluster.shell import shell_of
from minpro_megatron.cluster.slurm_job import JobError
from minpro_megatron.cluster.submit import conclude
from minpro_megatron.command_line import Parser
from minpro_megatron.errors import INTERRUPTED, UserError, run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro logs") -> int:
    parser = Parser(prog=prog, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("job", metavar="NAME", help="the run's name or the job's number")
    parser.add_argument("--follow", action="store_true", help="until the job has ended; its exit status as submit's")
    options = parser.parse_args(arguments)
    return run_reporting(lambda: _logs(options))


def _logs(options: argparse.Namespace) -> int:
    record = recall(records_folder(), options.job)
    if record.is_local and not options.follow:
        print("\n".join(trainer_log(record)))
        return 0
    refuse_local(record, "follow it in the terminal where it was submitted")
    if record.is_of_pods:
        pods.show_logs(record)
        return 0
    shell = shell_of(record.ssh_settings)
    if not options.follow:
        LogTail(shell, record.log_folder, record.job_id, sys.stdout).show_news()
        return 0
    try:
        intervals = OVER_SSH if record.ssh else HERE
        return conclude(follow(shell, record.job_id, record.log_folder, intervals=intervals), record)
    except KeyboardInterrupt:
        return INTERRUPTED
    except JobError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    from minpro_megatron.__main__ import run_command

    sys.exit(run_command("logs", sys.argv[1:], "python -m cluster.logs"))
