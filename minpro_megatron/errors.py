"""The project's own errors, and how a command that ends with an error reports it.

The message of a `ProjectError` states its cause, so its traceback does not help the user: commands print only the
message. Every other exception, including a ValueError from a library, is unexpected and is logged with its traceback.
"""

import logging
import select
import signal
import sys
from collections.abc import Callable, Iterable
from typing import ClassVar

from minpro_megatron.missing_packages import missing_package
from minpro_megatron.terminal_text import visible

log = logging.getLogger(__name__)

# The exit statuses of all processes of this project. By them a job's script (cluster/nemo.py) decides whether the job
# is started again.
SUCCEEDED = 0
FAILED = 1
WRONG_INPUT = 2  # a restart would fail in the same way
TRY_AGAIN = 69  # EX_UNAVAILABLE of sysexits.h: a machine cannot run its part now
HUNG = 70  # EX_SOFTWARE: the watchdog has ended the process
TO_BE_CONTINUED = 75  # EX_TEMPFAIL: the run has saved and resumes when it is started again
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class ProjectError(Exception):
    """Base of the project's errors. `problems` has one line per problem, usually one; `exit_status` is the exit status
    of a command that ends with the error."""

    exit_status: ClassVar[int] = FAILED

    def __init__(self, problems: str | Iterable[str]) -> None:
        given = [problems] if isinstance(problems, str) else list(problems)
        self.problems = [" ".join(problem.split()) for problem in given]
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)


class UserError(ProjectError, ValueError):
    """An input is wrong: a setting, an argument or a file. Each problem names field, value, rule and remedy. It is also
    a ValueError, so that settings classes report it like their own errors."""

    exit_status = WRONG_INPUT


class RunFailed(ProjectError):
    """The run cannot continue: its numerical results are invalid."""


class RunBlocked(RunFailed):
    """The run cannot continue without action by the user: a job does not restart it, because the restart would fail in
    the same way."""

    exit_status = WRONG_INPUT


class TryAgainError(ProjectError):
    """A machine cannot run its part now, but another start, perhaps on other machines, may succeed."""

    exit_status = TRY_AGAIN


def run_reporting(command: Callable[[], int], prefix: str = "error", *, reads_given_files: bool = False) -> int:
    """Calls `command` and returns its exit status. If it raises, the error is reported on standard error: a
    ProjectError with one line per problem after `prefix`, a package of an extra that is not installed with one line,
    any other exception with its traceback.

    `reads_given_files`: the command opens files that the user names, so an OSError that names a file is reported in one
    line.
    """
    try:
        return command()
    except ProjectError as error:
        return report(error, prefix)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _output_is_closed():
            return report_unexpected(prefix)
        raise
    except OSError as error:
        if not reads_given_files or error.filename is None:
            return report_unexpected(prefix)
        print(f"{prefix}: {visible(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
        return WRONG_INPUT
    except ModuleNotFoundError as error:
        if (problem := missing_package(error)) is None:
            return report_unexpected(prefix)
        return report(UserError(problem), prefix)
    except Exception:
        return report_unexpected(prefix)


def _output_is_closed() -> bool:
    """Whether the reader of this process's output has ended; another broken pipe is an error like any other."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except OSError:  # the output is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def report(error: ProjectError, prefix: str) -> int:
    """Prints the error's lines; returns its exit status."""
    for line in error.problems:
        print(f"{prefix}: {visible(line)}", file=sys.stderr)
    return error.exit_status


def report_unexpected(what: str) -> int:
    """Logs the current exception with its traceback; returns the exit status of a failure."""
    log.exception("%s: unexpected error", what)
    return FAILED


def first_error(group: ExceptionGroup) -> Exception:
    """The first error in the group that is no group itself: what its tasks failed of."""
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
