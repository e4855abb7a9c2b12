"""The project's own errors, and how a command that ends with an error reports it.

A `ProjectError` has a known cause and says it in its message, so its traceback is of no use to the reader: commands
print the message only. Every other exception is unexpected, a ValueError from a library included, and is logged with
its traceback.
"""

import logging
import sys
from collections.abc import Callable, Iterable
from typing import ClassVar

from minpro_megatron.terminal_text import visible

log = logging.getLogger(__name__)

SUCCEEDED, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
TRY_AGAIN = 69  # EX_UNAVAILABLE of sysexits.h; 75 is the end of a start that has saved (launch/supervisor.py)


class ProjectError(Exception):
    """Base of the project's errors. `problems` has one line for each problem, of which there is usually one;
    `exit_status` is that of a command which ends with the error."""

    exit_status: ClassVar[int] = FAILED

    def __init__(self, problems: str | Iterable[str]) -> None:
        given = [problems] if isinstance(problems, str) else list(problems)
        self.problems = [" ".join(problem.split()) for problem in given]
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)


class UserError(ProjectError, ValueError):
    """Something that was given is wrong: a setting, an argument, a file. Each problem names field, value, rule and
    remedy. It is a ValueError as well, so that settings classes report it as they report their own."""

    exit_status = WRONG_INPUT


class RunFailed(ProjectError):
    """The run itself cannot go on: its numbers are not what they must be."""


class RunBlocked(RunFailed):
    """The run cannot go on until a person has acted: a job does not start it again, for that would end in the same
    way."""

    exit_status = WRONG_INPUT


class TryAgainError(ProjectError):
    """A machine cannot do its part now, but another start, perhaps on other machines, may succeed."""

    exit_status = TRY_AGAIN


def run_reporting(command: Callable[[], int], prefix: str = "error", *, reads_given_files: bool = False) -> int:
    """The exit status of `command`; of one that raises, after the error was reported on standard error: a ProjectError
    in one line a problem after `prefix`, anything else in full.

    `reads_given_files`: the command opens files that its user names, so an OSError that names a file is reported in one
    line.
    """
    try:
        return command()
    except ProjectError as error:
        return report(error, prefix)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if not reads_given_files or error.filename is None:
            return report_unexpected(prefix)
        print(f"{prefix}: {visible(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
        return WRONG_INPUT
    except Exception:
        return report_unexpected(prefix)


def report(error: ProjectError, prefix: str) -> int:
    """Prints the error's lines; returns its exit status."""
    for line in error.problems:
        print(f"{prefix}: {visible(line)}", file=sys.stderr)
    return error.exit_status


def report_unexpected(what: str) -> int:
    """Logs the exception that is being handled, with its traceback; returns the exit status of a failure."""
    log.exception("%s: unexpected error", what)
    return FAILED


def first_error(group: ExceptionGroup) -> Exception:
    """The first error in the group that is no group itself: what its tasks failed of."""
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
