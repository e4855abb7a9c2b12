"""Where the cluster's commands run."""

import subprocess
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.profile import SshSettings


class Shell(Protocol):
    """Runs a command line, here or on a login node. The answer has stdout, stderr and return_code."""

    def run(self, command: str, hide: bool = True, warn: bool = False) -> Any: ...


@dataclass(frozen=True)
class Answer:
    """What a command has printed, and its exit status."""

    stdout: str
    stderr: str
    return_code: int


class ThisMachine:
    """A login node runs the cluster's commands itself. Without NeMo-Run, whose import takes seconds."""

    def run(self, command: str, hide: bool = True, warn: bool = False) -> Answer:
        """Raises CalledProcessError for a command that fails, unless `warn`."""
        done = subprocess.run(
            ["bash", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=not warn
        )
        return Answer(done.stdout, done.stderr, done.returncode)


def shell_of(ssh: SshSettings | None) -> Shell:
    """This machine, or the login node that is reached through NeMo-Run's tunnel."""
    if ssh is None:
        return ThisMachine()
    from cluster.nemo import tunnel

    return tunnel(ssh)
