"""One rollout server as a process: from its start until it answers, and its end together with its children."""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus

import psutil
import requests

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import ProjectError
from minpro_megatron.monitor.logs import explanation
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.addresses import url_here
from minpro_megatron.serving.api_key import authorization
from minpro_megatron.serving.ports import free_ports, listening_error
from minpro_megatron.serving.server_command import server_command, server_environment

# The number of lines of a server's log in a message: enough to show the error, without the output of loading.
LOG_LINES = 12
# SGLang checks for a SIGTERM every 5 s. A server has nothing to save, and this role has only seconds to stop.
STOP_GRACE_S = 3.0


class ServerStartError(ProjectError):
    """A server did not start. The message gives the reason; lines of its log that explain it may follow unchanged."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.problems = message.splitlines()

    def __str__(self) -> str:
        return "\n".join(self.problems)


def choose_port(config: RunConfig, index: int) -> int:
    """The port of server `index`: the one that the settings give it, or a free one.

    Raises ServerStartError if it cannot listen there.
    """
    host, first_port = config.server.host, config.server.first_port
    if not first_port:
        try:
            return free_ports(host, 1)[0]
        except OSError as error:
            raise ServerStartError(
                f"server {index}: no port on server.host = {host!r} can be used ({error}); set server.host to an "
                "address of this machine, or set server.first_port"
            ) from None
    port = first_port + index
    error = listening_error(host, port)
    if error is None:
        return port
    if error.errno == errno.EADDRINUSE:
        raise ServerStartError(
            f"server {index}: port {port} on {host} is taken by another program; "
            "end it, or set server.first_port to 0 or another port"
        )
    raise ServerStartError(f"server.host = {host!r}, port {port}: cannot listen there ({error}); correct them")


class ServerProcess:
    """Server `index` of the run, which may be started again after its end (`stop_servers`). `place` is its number among
    this machine's servers, by default `index`; it decides which GPUs the server uses.

    The output of all its starts goes to `run_dir/logs/server-<index>.log`. Raises UserError for a missing API key.
    """

    def __init__(self, config: RunConfig, index: int, place: int | None = None) -> None:
        self.index = index
        self._place = index if place is None else place
        self.log_file = config.run_dir / "logs" / f"server-{index}.log"
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._address: ServerAddress | None = None
        self._num_starts = 0
        self._log_start = 0  # where the log of this start begins
        self._headers = authorization(config)

    def start(self) -> None:
        """Starts the process and returns at once. The process ends with the thread that started it: use the main one.

        Raises ServerStartError if the port is taken, ValueError if the settings do not fit the model.
        """
        config, port = self._config, choose_port(self._config, self.index)
        command = server_command(config, self.index, port, self._place)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: an interrupt from the terminal must not reach the server before its clients
            # have ended.
            self._process = subprocess.Popen(
                command,
                env=server_environment(config, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._address = ServerAddress(
            index=self.index,
            url=url_here(config.server.host, port),
            tensor_parallel=config.server.tensor_parallel,
            start=self._num_starts,
        )
        self._num_starts += 1

    @property
    def address(self) -> ServerAddress:
        assert self._address is not None, "the server has not been started"
        return self._address

    @property
    def is_started(self) -> bool:
        return self._process is not None

    @property
    def exit_status(self) -> int | None:
        """None while the process lives."""
        assert self._process is not None, "the server has not been started"
        return self._process.poll()

    def wait_until_ready(self, timeout_s: float, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Waits until the server has generated a token; False if `cancelled` returns True before that.

        Raises ServerStartError if the process ends or `timeout_s` passes.
        """
        deadline = time.monotonic() + timeout_s
        while not self.generates():
            if cancelled():
                return False
            if self.exit_status is not None:
                raise ServerStartError(f"server {self.index}: {self._why_ended()}\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerStartError(self.describe_slow_start())  # timeout_s is the rest of the limit
            time.sleep(0.2)
        return True

    def generates(self) -> bool:
        """Whether the server generates a token now; after that it is ready. May take seconds."""
        with requests.Session() as session:
            session.trust_env = False  # no proxy for requests to this machine
            session.headers.update(self._headers)
            try:
                if session.get(f"{self.address.url}/health", timeout=5).status_code != HTTPStatus.OK:
                    return False
                request = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
                if session.post(f"{self.address.url}/generate", json=request, timeout=60).status_code != HTTPStatus.OK:
                    return False
            except requests.RequestException:
                return False
            self._freeze_garbage_collection(session)
        return True

    def _freeze_garbage_collection(self, session: requests.Session) -> None:
        # SGLang requests this from itself at start-up, but without a retry, and fails if its port does not listen yet.
        # Without it every collection scans the imported packages: 0.5 s per /flush_cache on two cores, 0.006 s with it.
        with suppress(requests.RequestException):
            session.post(f"{self.address.url}/freeze_gc", timeout=60)

    def describe_slow_start(self) -> str:
        """The message that the start took longer than allowed, with the lines of the log that may explain it."""
        limit_s = self._config.server.start_timeout_s
        return (
            f"server {self.index}: not ready after server.start_timeout_s = {limit_s:g} s; "
            f"raise it if the server was still loading\n{self.log_tail()}"
        )

    def _why_ended(self) -> str:
        status = self.exit_status
        how = f"by signal {signal.Signals(-status).name}" if status and status < 0 else f"with status {status}"
        return f"its process ended {how}; from {self.log_file}:"

    def describe_end(self) -> str:
        """How the process ended and the lines of its log that explain it, for a message."""
        return f"server {self.index} at {self.address.url}: {self._why_ended()}\n{self.log_tail()}"

    def log_tail(self) -> str:
        """The lines of the log that explain the end of this start, else the last ones; empty if there is no log."""
        return "\n".join(explanation(self.log_file, LOG_LINES, self._log_start))


def stop_servers(servers: list[ServerProcess], grace_s: float = STOP_GRACE_S) -> None:
    """Ends the servers with all their processes: SIGTERM, then SIGKILL for those left after `grace_s`."""
    started = [server._process for server in servers if server._process is not None]
    members: dict[int, psutil.Process] = {}
    for process in started:
        members |= _process_tree(process.pid)
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM) if process.poll() is None else None
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(process.poll() is None for process in started):
        time.sleep(0.05)
    for process in started:
        members |= _process_tree(process.pid)  # children started during the grace period
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for member in members.values():
        with suppress(psutil.NoSuchProcess):
            member.kill()
    for process in started:
        process.wait()
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and any(_runs(member) for member in members.values()):
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    try:  # an orphan may stay a zombie until its new parent collects it: it holds no resources
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _process_tree(pid: int) -> dict[int, psutil.Process]:
    try:
        process = psutil.Process(pid)
        return {member.pid: member for member in [process, *process.children(recursive=True)]}
    except psutil.NoSuchProcess:
        return {}
