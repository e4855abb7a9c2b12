"""Runs code in a process of its own under limits (sandbox_process.py)."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minpro_megatron.config.environment import PythonToolConfig
from minpro_megatron.environments.python_tool.outcome import Outcome, outcome
from minpro_megatron.errors import UserError

_PROGRAM = Path(__file__).with_name("sandbox_process.py")
# For the start of both processes and the views of the file system, in addition to the limit of the code.
START_S = 30.0
# A character has at most four bytes; an output of this size is cut later.
_BYTES_PER_CHARACTER = 4
_OUT_OF_MEMORY = "MemoryError"


class SandboxFailed(RuntimeError):
    """The code could not be run, which is not its own fault."""


class Sandbox:
    """Runs at most `settings.workers` pieces of code at a time; use inside `with`."""

    def __init__(self, settings: PythonToolConfig) -> None:
        self._settings = settings
        self._room = asyncio.Semaphore(settings.workers)
        # What a killed process leaves is removed at the end.
        self._folder = _temporary_folder()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    async def run(self, code: str) -> Outcome:
        """The outcome of the code. Raises SandboxFailed if it could not be started."""
        async with self._room:
            try:
                process = await asyncio.create_subprocess_exec(
                    *_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    env=_environment(),
                )  # fmt: skip
            except OSError as error:  # no more files, processes or memory
                raise SandboxFailed(f"no process could be started: {error}") from error
            try:
                async with asyncio.timeout(self._settings.timeout_s + START_S):
                    answer, error = await process.communicate(_request(self._settings, code, self._folder.name))
            except TimeoutError:
                raise SandboxFailed(f"no result within {START_S:g} s after the limit of the code") from None
            finally:
                if process.returncode is None:  # also if this call was cancelled: the code ends with its process
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
        return _read(self._settings, answer, error)


def isolation_problem(settings: PythonToolConfig) -> str:
    """Why code cannot be isolated on this machine; empty if it can. Blocks for about a second."""
    if not sys.platform.startswith("linux"):
        return "isolation needs the namespaces of Linux"
    try:
        with _temporary_folder() as folder:
            run = subprocess.run(
                _command(), input=_request(settings, "print(6 * 7)", folder), capture_output=True, env=_environment(),
                timeout=settings.timeout_s + START_S,
            )  # fmt: skip
        found = _read(settings, run.stdout, run.stderr)
    except (SandboxFailed, subprocess.TimeoutExpired, OSError) as error:
        return str(error)
    return "" if found == Outcome("42") else f"6 * 7 gave {found.text!r}"


def check_isolation(settings: PythonToolConfig) -> None:
    """Raises UserError if the settings ask for isolation and this machine does not allow it."""
    if settings.sandbox == "isolated" and (problem := isolation_problem(settings)):
        raise UserError(
            f"environment.python_tool.sandbox = isolated: code cannot be isolated on this machine: {problem}; allow "
            "user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces; in a container they "
            "need seccomp and AppArmor profiles that permit them), use a sandbox service, or set it to none for code "
            "that you trust"
        )


def _command() -> list[str]:
    return [sys.executable, "-I", "-S", "-B", str(_PROGRAM)]


def _environment() -> dict[str, str]:
    """Nothing of this process's environment, which may hold keys. What the program loader needs is kept."""
    return {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH")}


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="minpro-tool-", ignore_cleanup_errors=True)


def _request(settings: PythonToolConfig, code: str, folder: str) -> bytes:
    request = {
        "code": code,
        "isolated": settings.sandbox == "isolated",
        "folder": folder,
        "python": sys.executable,
        "visible": [sys.prefix, sys.base_prefix],
        "timeout_s": settings.timeout_s,
        "memory_bytes": settings.memory_mb << 20,
        "processes": settings.max_processes,
        "file_bytes": settings.max_file_mb << 20,
        "output_bytes": _BYTES_PER_CHARACTER * settings.max_output_chars,
    }
    return json.dumps(request).encode()


def _read(settings: PythonToolConfig, answer: bytes, error: bytes) -> Outcome:
    try:
        found: dict[str, Any] = json.loads(answer)
        ended, status, output = found["ended"], found["status"], found["output"]
    except (ValueError, KeyError, TypeError):
        last = error.decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxFailed(f"the process that runs the code failed: {last or 'no message'}") from None
    if ended == "unavailable":
        raise SandboxFailed(output)
    return outcome(output, _problem(settings, ended, status, output), settings.max_output_chars)


def _problem(settings: PythonToolConfig, ended: str, status: int, output: str) -> str:
    if ended == "timeout":
        return f"the code was ended after the time limit of {settings.timeout_s:g} s"
    if ended == "output":
        return f"the code was ended because it printed more than {settings.max_output_chars} characters"
    if status == 0:
        return ""
    if output.rstrip().endswith(_OUT_OF_MEMORY):
        return f"the memory limit of {settings.memory_mb} MiB was reached"
    return f"the code ended with status {status}"
