"""What the collector's HTTP interface and the trainer's feed agree on."""

from pathlib import Path

import msgspec

from minpro_megatron.files.replacement import write_secret

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
    return write_secret(Path(run_dir) / COLLECTOR_TOKEN)


def read_token(run_dir: Path) -> str:
    """The token of the collector whose endpoint has been read. Raises OSError where this user may not."""
    return (Path(run_dir) / COLLECTOR_TOKEN).read_text(encoding="ascii")
