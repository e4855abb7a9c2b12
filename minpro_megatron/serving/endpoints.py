"""What serve and collect tell each other about the rollout servers, in files of `run_dir/endpoints`.

`server-<index>.json`, from serve to collect: where a server listens. `restart-<index>.json`, from collect to serve: a
server answers but does no work, which only those see who give it work.
"""

from pathlib import Path

import msgspec

from minpro_megatron.config.rollout import ServerConfig
from minpro_megatron.monitor.files import replace_file
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


def endpoint_file(run_dir: Path, index: int) -> Path:
    return Path(run_dir) / "endpoints" / f"server-{index}.json"


def write_server_address(run_dir: Path, address: ServerAddress, incarnation: int) -> None:
    """States that the server is ready for requests."""
    endpoint = _Endpoint(**msgspec.structs.asdict(address), incarnation=incarnation)
    replace_file(endpoint_file(run_dir, address.index), msgspec.json.encode(endpoint).decode() + "\n")


def remove_server_address(run_dir: Path, index: int) -> None:
    """Withdraws one server's address: whoever works with it moves its work elsewhere."""
    endpoint_file(run_dir, index).unlink(missing_ok=True)


def _restart_file(run_dir: Path, index: int) -> Path:
    return Path(run_dir) / "endpoints" / f"restart-{index}.json"


def request_restart(run_dir: Path, address: ServerAddress, incarnation: int, reason: str) -> None:
    """Asks serve to start the server of this address again."""
    request = _RestartRequest(start=address.start, incarnation=incarnation, reason=reason)
    replace_file(_restart_file(run_dir, address.index), msgspec.json.encode(request).decode() + "\n")


def restart_requested(run_dir: Path, index: int, start: int, incarnation: int) -> str | None:
    """The reason for which start `start` of the server is to be followed by another one; None if there is none."""
    try:
        request = msgspec.json.decode(_restart_file(run_dir, index).read_bytes(), type=_RestartRequest)
    except FileNotFoundError:
        return None
    return request.reason if (request.start, request.incarnation) == (start, incarnation) else None


def read_server_addresses(run_dir: Path, count: int, incarnation: int) -> list[ServerAddress]:
    """The addresses of this incarnation's servers 0 .. count-1 that are ready by now, in order of index."""
    addresses = []
    for index in range(count):
        try:
            endpoint = msgspec.json.decode(endpoint_file(run_dir, index).read_bytes(), type=_Endpoint)
        except FileNotFoundError:
            continue
        if endpoint.incarnation == incarnation:
            fields = msgspec.structs.asdict(endpoint)
            del fields["incarnation"]
            addresses.append(ServerAddress(**fields))
    return addresses
