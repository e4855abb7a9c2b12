"""What the collector's HTTP interface and the trainer's feed agree on."""

import msgspec

# Relative to the run folder.
COLLECTOR_ENDPOINT = "endpoints/collector.json"
# Every request names the incarnation of the run it belongs to: a left-over trainer must not consume batches.
INCARNATION_HEADER = "X-Run-Incarnation"
# A request that has to wait is answered with status 204 after this many seconds and sent again.
LONG_POLL_S = 20.0


class CollectorEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The content of COLLECTOR_ENDPOINT."""

    url: str
    incarnation: int
