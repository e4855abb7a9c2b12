"""Definitions shared by the collector's HTTP interface and the trainer's feed."""

from http import HTTPStatus
from pathlib import Path

import msgspec

from minpro_megatron.files.replacement import write_secret

# Relative to the run folder.
COLLECTOR_ENDPOINT = "endpoints/collector.json"
COLLECTOR_TOKEN = "endpoints/collector.token"
# Every request names its incarnation of the run: a trainer left over from an earlier one must not consume batches.
INCARNATION_HEADER = "X-Run-Incarnation"
# Every request also carries this collector's token: processes of other users reach its port, but not a file of mode
# 0600.
TOKEN_HEADER = "X-Collector-Token"
# A request that has to wait is answered with NOT_READY after this many seconds and sent again.
LONG_POLL_S = 20.0

# The statuses of the answers, besides 200.
NOT_READY = HTTPStatus.NO_CONTENT
# A PublishLease of the version that the servers already hold, for servers that have lost it: publish it, and ask again.
LEASE_FIRST = HTTPStatus.ACCEPTED
DAMAGED_REQUEST = HTTPStatus.BAD_REQUEST
WITHOUT_TOKEN = HTTPStatus.FORBIDDEN
OUT_OF_ORDER = HTTPStatus.CONFLICT  # or of another incarnation
COLLECTOR_FAILED = HTTPStatus.INTERNAL_SERVER_ERROR


class CollectorEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The content of COLLECTOR_ENDPOINT."""

    url: str
    incarnation: int


def write_token(run_dir: Path) -> str:
    """Writes a new random token into a file that only this user may read, and returns it. Replaces an earlier token."""
    return write_secret(Path(run_dir) / COLLECTOR_TOKEN)


def read_token(run_dir: Path) -> str:
    """The token of the collector whose endpoint has been read. Raises OSError if this user may not read it."""
    return (Path(run_dir) / COLLECTOR_TOKEN).read_text(encoding="ascii")
