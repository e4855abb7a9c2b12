"""Runs commands of the cluster, here or on a login node."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from minpro_megatron.cluster.sections import SshSettings

CONNECTION_LOST = 255
# What the commands say is read, and they speak the language of their user.
_IN_ENGLISH = "export LC_ALL=C; "


class Shell(Protocol):
    """Runs a command line, here or on a login node. The result has stdout, stderr and return_code."""

    def run(self, command: str, hide: bool = True, warn: bool = False) -> Any: ...


@dataclass(frozen=True)
class Answer:
    """A command's output and exit status."""

    stdout: str
    stderr: str
    return_code: int


class ThisMachine:
    """Runs the cluster's commands on this login node, without NeMo-Run, whose import takes seconds."""

    def run(self, command: str, hide: bool = True, warn: bool = False) -> Answer:
        """Raises CalledProcessError for a command that fails, unless `warn`."""
        done = subprocess.run(
            ["bash", "-c", _IN_ENGLISH + command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=not warn,
        )
        return Answer(done.stdout, done.stderr, done.returncode)


class LoginNode:
    """A login node over a tunnel of NeMo-Run. If the connection is lost, the answer has ssh's own status, 255, and the
    next command connects again."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._tunnel: Any = None

    def run(self, command: str, hide: bool = True, warn: bool = False) -> Answer:
        """Raises CalledProcessError for a command that fails, unless `warn`."""
        try:
            if self._tunnel is None:
                self._tunnel = self._connect()
            done = self._tunnel.run(_IN_ENGLISH + command, hide=True, warn=True)
            answer = Answer(done.stdout, done.stderr, done.return_code)
        # from paramiko, fabric, invoke and sockets; NeMo-Run ends the program if it cannot log in
        except (Exception, SystemExit) as error:
            self._tunnel = None
            answer = Answer("", f"no connection to the login node ({type(error).__name__}: {error})", CONNECTION_LOST)
        if answer.return_code and not warn:
            raise subprocess.CalledProcessError(answer.return_code, command, answer.stdout, answer.stderr)
        return answer


def shell_of(ssh: SshSettings | None) -> Shell:
    """This machine, or the login node that is reached through NeMo-Run's tunnel."""
    if ssh is None:
        return ThisMachine()
    from minpro_megatron.cluster.tunnel import tunnel

    return LoginNode(lambda: tunnel(ssh))
