"""Messages between serve and collect about the rollout servers, in files of `run_dir/endpoints`.

`server-<index>-start-<incarnation>.json`, from serve to collect: the address of a server.
`restart-<index>-start-<incarnation>.json`, from collect to serve: a server answers but does not work, which only the
collector can detect. The names contain the incarnation of the run, so that an older start cannot change the files of a
newer one.
"""

from pathlib import Path

import msgspec

from minpro_megatron.config.server import ServerConfig
from minpro_megatron.files.replacement import replace_file_in
from minpro_megatron.records import ServerAddress


class _Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A ServerAddress, and the incarnation of the run that started the server; files of older ones are ignored."""

    index: int
    url: str
    tensor_parallel: int
    start: int
    incarnation: int


class _RestartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`start` is the start of the server that is to be restarted; the request does not apply to a later one."""

    start: int
    incarnation: int
    reason: str


def num_servers(server: ServerConfig) -> int:
    """The number of the run's servers, whether started by it or external."""
    return len(server.urls) or server.count


def endpoint_file(run_dir: Path, index: int, incarnation: int) -> Path:
    return Path(run_dir) / _endpoint_name(index, incarnation)


def _endpoint_name(index: int, incarnation: int) -> str:
    return f"endpoints/server-{index}-start-{incarnation}.json"


def write_server_address(run_dir: Path, address: ServerAddress, incarnation: int) -> None:
    """Announces that the server is ready for requests. Raises OSError, or FileNotFoundError without a run folder."""
    endpoint = _Endpoint(**msgspec.structs.asdict(address), incarnation=incarnation)
    name = _endpoint_name(address.index, incarnation)
    replace_file_in(Path(run_dir), name, msgspec.json.encode(endpoint).decode() + "\n")


def remove_server_address(run_dir: Path, index: int, incarnation: int) -> None:
    """Withdraws one server's address; its work moves to other servers."""
    endpoint_file(run_dir, index, incarnation).unlink(missing_ok=True)


def address_is_stated(run_dir: Path, index: int, incarnation: int) -> bool:
    """Whether the file with the server's address exists: it may have been removed by hand."""
    return endpoint_file(run_dir, index, incarnation).exists()


def _restart_name(index: int, incarnation: int) -> str:
    return f"endpoints/restart-{index}-start-{incarnation}.json"


def request_restart(run_dir: Path, address: ServerAddress, incarnation: int, reason: str) -> None:
    """Asks serve to restart the server of this address."""
    request = _RestartRequest(start=address.start, incarnation=incarnation, reason=reason)
    name = _restart_name(address.index, incarnation)
    replace_file_in(Path(run_dir), name, msgspec.json.encode(request).decode() + "\n")


def restart_requested(run_dir: Path, index: int, start: int, incarnation: int) -> str | None:
    """The reason why start `start` of the server is to be restarted; None if there is none."""
    try:
        request = msgspec.json.decode(
            (Path(run_dir) / _restart_name(index, incarnation)).read_bytes(), type=_RestartRequest
        )
    except FileNotFoundError:
        return None
    return request.reason if (request.start, request.incarnation) == (start, incarnation) else None


def read_server_addresses(run_dir: Path, count: int, incarnation: int) -> list[ServerAddress]:
    """The addresses of this incarnation's servers 0 .. count-1 that are ready now, in order of index."""
    addresses = []
    for index in range(count):
        try:
            endpoint = msgspec.json.decode(endpoint_file(run_dir, index, incarnation).read_bytes(), type=_Endpoint)
        except FileNotFoundError:
            continue
        if endpoint.incarnation == incarnation:
            fields = msgspec.structs.asdict(endpoint)
            del fields["incarnation"]
            addresses.append(ServerAddress(**fields))
    return addresses
