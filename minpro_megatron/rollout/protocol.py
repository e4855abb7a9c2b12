"""What the collector's HTTP interface and the trainer's feed agree on."""

import os
import secrets
from pathlib import Path

import msgspec

# Relative to the run folder.
COLLECTOR_ENDPOINT = "endpoints/collector.json"
COLLECTOR_TOKEN = "endpoints/collector.token"
# Every request names the incarnation of the run it belongs to: a left-over trainer must not consume batches.
INCARNATION_HEADER = "X-Run-Incarnation"
# And a secret of this collector's: other users' processes reach its port, but not a file of mode 0600.
TOKEN_HEADER = "X-Collector-Token"
# A request that has to wait is answered with status 204 after this many seconds and sent again.
LONG_POLL_S = 20.0


class CollectorEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The content of COLLECTOR_ENDPOINT."""

    url: str
    incarnation: int


def write_token(run_dir: Path) -> str:
    """A new random token, in a file that only this user may read; a former one is replaced."""
    token, path = secrets.token_urlsafe(32), Path(run_dir) / COLLECTOR_TOKEN
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # with its mode, whatever that was
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token)
    temporary.replace(path)
    return token


def read_token(run_dir: Path) -> str:
    """The token of the collector whose endpoint has been read. Raises OSError where this user may not."""
    return (Path(run_dir) / COLLECTOR_TOKEN).read_text(encoding="ascii")
