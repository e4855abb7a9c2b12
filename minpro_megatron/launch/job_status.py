"""The exit status of a node, stated in a file for the script of its job.

srun reports the largest exit status of all nodes. It ends the other nodes by a signal as soon as one has failed, so the
job's script sees 143 (SIGTERM) in place of the status that decides whether the job is started again."""

import logging
from collections.abc import Mapping
from pathlib import Path

from minpro_megatron.errors import TO_BE_CONTINUED, WRONG_INPUT

log = logging.getLogger(__name__)

# Environment variable that the job's script sets to the beginning of the files' paths, on a shared file system.
EXIT_STATUS_VARIABLE = "MINPRO_EXIT_STATUS_FILES"
# The statuses that decide about a restart of the job; an earlier one counts more.
STATED = (WRONG_INPUT, TO_BE_CONTINUED)


def state_exit_status(status: int, environment: Mapping[str, str]) -> None:
    """Creates the file for `status` if the job's script reads it; the file's name ends with the status. A file that
    cannot be created is a warning: the node's own exit status remains."""
    files = environment.get(EXIT_STATUS_VARIABLE)
    if not files or status not in STATED:
        return
    try:
        Path(f"{files}.{status}").touch()
    except OSError as error:
        log.warning("the job's script cannot be given the exit status %d: %s", status, error)
