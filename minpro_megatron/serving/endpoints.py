"""What serve and collect tell each other about the rollout servers, in files of `run_dir/endpoints`.

`server-<index>-start-<incarnation>.json`, from serve to collect: where a server listens.
`restart-<index>-start-<incarnation>.json`, from collect to serve: a server answers but does no work, which only those
see who give it work. The names hold the incarnation of the run, so that an older start cannot change the files of a
newer one.
"""

from pathlib import Path

import msgspec

from minpro_megatron.config.rollout import ServerConfig
from minpro_megatron.files.replacement import replace_file_in
from minpro_megatron.records import ServerAddress


class _Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A ServerAddress, and the incarnation of the run that started the server: older files do not count."""

    index: int
    url: str
    tensor_parallel: int
    start: int
    incarnation: int


class _RestartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`start`: which start of the server it is about; a later one has nothing to do with it."""

    start: int
    incarnation: int
    reason: str


def num_servers(server: ServerConfig) -> int:
    """How many servers the run has, started by it or not."""
    return len(server.urls) or server.count


def endpoint_file(run_dir: Path, index: int, incarnation: int) -> Path:
    return Path(run_dir) / _endpoint_name(index, incarnation)


def _endpoint_name(index: int, incarnation: int) -> str:
    return f"endpoints/server-{index}-start-{incarnation}.json"


def write_server_address(run_dir: Path, address: ServerAddress, incarnation: int) -> None:
    """States that the server is ready for requests. Raises OSError, FileNotFoundError where the run folder is gone."""
    endpoint = _Endpoint(**msgspec.structs.asdict(address), incarnation=incarnation)
    name = _endpoint_name(address.index, incarnation)
    replace_file_in(Path(run_dir), name, msgspec.json.encode(endpoint).decode() + "\n")


def remove_server_address(run_dir: Path, index: int, incarnation: int) -> None:
    """Withdraws one server's address: whoever works with it moves its work elsewhere."""
    endpoint_file(run_dir, index, incarnation).unlink(missing_ok=True)


def address_is_stated(run_dir: Path, index: int, incarnation: int) -> bool:
    """Whether the file with the server's address is there: somebody may have removed it by hand."""
    return endpoint_file(run_dir, index, incarnation).exists()


def _restart_name(index: int, incarnation: int) -> str:
    return f"endpoints/restart-{index}-start-{incarnation}.json"


def request_restart(run_dir: Path, address: ServerAddress, incarnation: int, reason: str) -> None:
    """Asks serve to start the server of this address again."""
    request = _RestartRequest(start=address.start, incarnation=incarnation, reason=reason)
    name = _restart_name(address.index, incarnation)
    replace_file_in(Path(run_dir), name, msgspec.json.encode(request).decode() + "\n")


def restart_requested(run_dir: Path, index: int, start: int, incarnation: int) -> str | None:
    """The reason for which start `start` of the server is to be followed by another one; None if there is none."""
    try:
        request = msgspec.json.decode(
            (Path(run_dir) / _restart_name(index, incarnation)).read_bytes(), type=_RestartRequest
        )
    except FileNotFoundError:
        return None
    return request.reason if (request.start, request.incarnation) == (start, incarnation) else None


def read_server_addresses(run_dir: Path, count: int, incarnation: int) -> list[ServerAddress]:
    """The addresses of this incarnation's servers 0 .. count-1 that are ready by now, in order of index."""
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
