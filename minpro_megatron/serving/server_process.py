"""One SGLang server as a process: its command line, its start until it answers, its end with its children."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.model_files import read_model_facts

LOG_TAIL_LINES = 30
# SGLang's scheduler silently shortens a response that would end at the context length or the KV pool's
# size, at most this many tokens before it: without the margin the longest responses would be cut below
# max_response_tokens.
CONTEXT_MARGIN_TOKENS = 8
# Free ports are looked for below the range from which Linux gives ports to outgoing connections: a port of
# that range could be taken in the half minute between choosing it and the server listening on it.
PORT_RANGE = range(20000, 32000)


# SGLang looks for a SIGTERM every 5 s. A server has nothing to save, and who stops this role waits only seconds.
STOP_GRACE_S = 3.0


class ServerStartError(RuntimeError):
    """A server did not come up. The message says why, and the last lines of its log follow."""


def context_length(config: RunConfig) -> int:
    """The tokens a sequence may have on the server: prompt, response and SGLang's own margin.

    Raises ValueError if the model or the KV cache cannot hold the longest allowed sequence.
    """
    sampling = config.sampling
    length = sampling.max_prompt_tokens + sampling.max_response_tokens + CONTEXT_MARGIN_TOKENS
    longest = read_model_facts(config.model.hf_path).max_position_embeddings
    needed = f"sampling.max_prompt_tokens + sampling.max_response_tokens + {CONTEXT_MARGIN_TOKENS} = {length}"
    if length > longest:
        raise ValueError(f"{needed} exceeds the model's max_position_embeddings = {longest}; lower one of them")
    cache = config.server.max_total_tokens
    if cache is not None and cache < length:
        raise ValueError(f"{needed} exceeds server.max_total_tokens = {cache}; raise it")
    return length


def server_command(config: RunConfig, index: int, port: int) -> list[str]:
    """The command line of server `index`, listening on `port`."""
    server = config.server
    length = context_length(config)
    arguments = {
        "model-path": config.model.hf_path,
        "host": server.host,
        "port": port,
        "device": server.device,
        "dtype": server.dtype,
        "tp-size": server.tensor_parallel,
        "context-length": length,
        "max-running-requests": server.max_running_requests,
        "random-seed": derive_seed(config.seed, "server", index),
        # The version of the weights that the checkpoint holds; the trainer publishes 1, 2, ...
        "weight-version": 0,
        # One line a request would be most of the log.
        "log-level-http": "warning",
        "decode-log-interval": 1000,
    }
    cache = server.max_total_tokens
    if server.device == "cpu":
        arguments |= {
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "chunked-prefill-size": 4096,
        }
        # SGLang would give most of the machine's memory to the cache; half a minute goes by until it is
        # allocated.
        cache = cache or max(length, min(server.max_running_requests * length, 65536))
    else:
        arguments |= {"base-gpu-id": index * server.tensor_parallel}
    if cache is not None:
        arguments |= {"max-total-tokens": cache}
    command = [sys.executable, "-m", "minpro_megatron.serving.sglang_main"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    # Tokens in, tokens out: the tokenizer stays in collect. An idle scheduler would otherwise spin on a
    # whole core.
    return [*command, "--skip-tokenizer-init", "--skip-server-warmup", "--sleep-on-idle"]


def server_environment(config: RunConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server process, from that of this process."""
    # A server talks to itself over HTTP when it starts, which a proxy setting must not redirect.
    not_proxied = ",".join(filter(None, [environment.get("NO_PROXY"), config.server.host, "127.0.0.1", "localhost"]))
    changes = {
        # With SGLang's 5 s a connection often closes while the trainer trains, under the next request's feet.
        "SGLANG_TIMEOUT_KEEP_ALIVE": "600",
        # /health then only tells whether the server is up; generating is proved once, after the start.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "NO_PROXY": not_proxied,
        "no_proxy": not_proxied,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if Path(config.model.hf_path).is_dir():
        changes |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if config.server.device == "cpu":
        changes |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        # gloo would look its address up by the machine's name, which need not resolve.
        loopback = "lo" if sys.platform.startswith("linux") else "lo0"
        changes |= {"GLOO_SOCKET_IFNAME": environment.get("GLOO_SOCKET_IFNAME", loopback)}
    return dict(environment) | changes


def choose_port(config: RunConfig, index: int) -> int:
    """The port of server `index`. Raises ServerStartError if the given one is taken."""
    host, first_port = config.server.host, config.server.first_port
    if first_port:
        port = first_port + index
        if not _is_free(host, port):
            raise ServerStartError(
                f"server {index}: port {port} on {host} is taken by another program; "
                "end it, or set server.first_port to 0 or another port"
            )
        return port
    for port in random.SystemRandom().sample(PORT_RANGE, 200):
        if _is_free(host, port):
            return port
    raise ServerStartError(
        f"server {index}: no free port between {PORT_RANGE.start} and {PORT_RANGE.stop - 1} on {host} "
        "in 200 tries; set server.first_port"
    )


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError) as error:
        raise ServerStartError(
            f"server.host = {host!r}, port {port}: not an address of this machine ({error})"
        ) from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a closed connection is free
        try:
            probe.bind(address)
        except OSError:
            return False
        return True


class ServerProcess:
    """Server `index` of this machine. Its output goes to `run_dir/logs/server-<index>.log`."""

    def __init__(self, config: RunConfig, index: int) -> None:
        self.index = index
        self.log_file = config.run_dir / "logs" / f"server-{index}.log"
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._address: ServerAddress | None = None

    def start(self) -> None:
        """Starts the process and returns at once. It ends with the thread that started it: use the main one.

        Raises ServerStartError if the port is taken, ValueError if the settings do not fit the model.
        """
        config, port = self._config, choose_port(self._config, self.index)
        command = server_command(config, self.index, port)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            # A session of its own: a terminal's interrupt must not reach the server before its clients have
            # ended.
            self._process = subprocess.Popen(
                command,
                env=server_environment(config, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        url_host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        url_host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(url_host, url_host)
        self._address = ServerAddress(
            index=self.index, url=f"http://{url_host}:{port}", tensor_parallel=config.server.tensor_parallel
        )

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
        """Waits until the server has generated a token; False if `cancelled` says so before that.

        Raises ServerStartError if the process ends or `timeout_s` passes.
        """
        deadline = time.monotonic() + timeout_s
        with requests.Session() as session:
            session.trust_env = False  # no proxy between this machine and itself
            while not self._answers(session):
                if cancelled():
                    return False
                if self.exit_status is not None:
                    raise ServerStartError(f"server {self.index}: {self._why_ended()}\n{self.log_tail()}")
                if time.monotonic() > deadline:
                    limit_s = self._config.server.start_timeout_s  # timeout_s is what was left of it
                    raise ServerStartError(
                        f"server {self.index}: not ready after server.start_timeout_s = {limit_s:g} s; "
                        f"raise it if the server was still loading\n{self.log_tail()}"
                    )
                time.sleep(0.2)
            self._freeze_garbage_collection(session)
        return True

    def _freeze_garbage_collection(self, session: requests.Session) -> None:
        # SGLang asks itself for this at start-up, without a second try, before its port listens if it is slow. Without
        # it every collection walks the imported packages: 0.5 s for each /flush_cache on two cores, 0.006 s with it.
        with suppress(requests.RequestException):
            session.post(f"{self.address.url}/freeze_gc", timeout=60)

    def _answers(self, session: requests.Session) -> bool:
        try:
            if session.get(f"{self.address.url}/health", timeout=5).status_code != 200:
                return False
            request = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
            return session.post(f"{self.address.url}/generate", json=request, timeout=60).status_code == 200
        except requests.RequestException:
            return False

    def _why_ended(self) -> str:
        status = self.exit_status
        how = f"by signal {signal.Signals(-status).name}" if status and status < 0 else f"with status {status}"
        return f"its process ended {how}; the end of {self.log_file}:"

    def describe_end(self) -> str:
        """How the process ended and the end of its log, for a message."""
        return f"server {self.index} at {self.address.url}: {self._why_ended()}\n{self.log_tail()}"

    def log_tail(self, num_lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of the log."""
        try:
            with self.log_file.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 64 * 1024))
                lines = log.read().decode("utf-8", errors="replace").splitlines()
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join(lines[-num_lines:])


def stop_servers(servers: list[ServerProcess], grace_s: float = STOP_GRACE_S) -> None:
    """Ends the servers with all their processes: SIGTERM, and SIGKILL for what is left after `grace_s`."""
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
        members |= _process_tree(process.pid)  # children born during the grace
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
    try:  # an orphan may stay a zombie until whoever adopted it looks: it holds nothing any more
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _process_tree(pid: int) -> dict[int, psutil.Process]:
    try:
        process = psutil.Process(pid)
        return {member.pid: member for member in [process, *process.children(recursive=True)]}
    except psutil.NoSuchProcess:
        return {}
