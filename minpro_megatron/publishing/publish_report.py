"""Reports on publications, for the collector and as metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from minpro_megatron.metrics.metric import Metric, largest, mean, merge, total, values
from minpro_megatron.publishing.canary import Difference
from minpro_megatron.publishing.sender import Transport


@dataclass(frozen=True)
class PublishReport:
    """The result of a publication."""

    version: int
    held_by: list[int]  # indices of the servers that have the version, verified
    failures: dict[int, str]  # the reason for each of the lease's other servers, one line each
    transport: Transport | None  # None: no server was left to send to
    total_s: float
    paused_s: float  # time for which servers were paused because requests were in flight
    transfer_s: float  # from the first byte to the last byte at the last server
    num_bytes: int
    checksum: str  # of the weights on the servers; empty if there are none
    canaries: dict[int, Difference]  # by server
    late: list[int] = field(default_factory=list)  # of the servers that failed, those that did not answer in time
    fell_back: bool = False  # the servers loaded from disk because publish.transport had failed

    def metrics(self) -> dict[str, Metric]:
        """By their names in metrics.metric.METRICS, to be merged with those of other publications."""
        canaries = self.canaries.values()
        return {
            "publish/paused_s": largest(self.paused_s),
            "publish/bytes_per_s": mean(self.num_bytes, self.transfer_s),
            "publish/failures": total(len(self.failures)),
            "publish/fallbacks": total(int(self.fell_back)),
            "publish/canary_abs_mean": mean(sum(one.mean for one in canaries), len(canaries)),
            "publish/canary_server_max": Metric(max((one.mean for one in canaries), default=0.0), len(canaries), "max"),
            "publish/canary_abs_max": Metric(max((one.max for one in canaries), default=0.0), len(canaries), "max"),
        }


def publication_metrics(reports: Sequence[PublishReport]) -> dict[str, float]:
    """Scalars over all publications of a step: the last is its own; those before it are of the previous version, to
    servers that had lost it. The number of servers is that of the last publication."""
    if not reports:
        return {}
    found = values(merge([report.metrics() for report in reports]))
    return found | {"publish/servers": float(len(reports[-1].held_by))}
