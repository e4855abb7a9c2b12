"""How publications went, for the collector and as metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from minpro_megatron.metrics.metric import Metric, largest, mean, merge, total, values
from minpro_megatron.publishing.canary import Difference
from minpro_megatron.publishing.delivery import Transport


@dataclass(frozen=True)
class PublishReport:
    """How a publication went."""

    version: int
    held_by: list[int]  # indices of the servers that hold the version, verified
    failures: dict[int, str]  # why the lease's other servers do not, a line each
    transport: Transport | None  # None: there was no server left to send to
    total_s: float
    paused_s: float  # servers paused because requests were in flight
    transfer_s: float  # from the first byte to the last server's last
    num_bytes: int
    checksum: str  # of the weights on the servers; empty if there are none
    canaries: dict[int, Difference]  # by server
    late: list[int] = field(default_factory=list)  # of the servers that failed, those that did not answer in time

    def metrics(self) -> dict[str, Metric]:
        """By their names in metrics.metric.METRICS, to be merged with those of other publications."""
        canaries = self.canaries.values()
        return {
            "publish/paused_s": largest(self.paused_s),
            "publish/bytes_per_s": mean(self.num_bytes, self.transfer_s),
            "publish/failures": total(len(self.failures)),
            "publish/canary_abs_mean": mean(sum(one.mean for one in canaries), len(canaries)),
            "publish/canary_server_max": Metric(max((one.mean for one in canaries), default=0.0), len(canaries), "max"),
            "publish/canary_abs_max": Metric(max((one.max for one in canaries), default=0.0), len(canaries), "max"),
        }


def publication_metrics(reports: Sequence[PublishReport]) -> dict[str, float]:
    """Scalars of all publications of a step: its own, the last, and before it those of the version before, to servers
    that had lost it. Only the number of servers is of the last alone."""
    if not reports:
        return {}
    found = values(merge([report.metrics() for report in reports]))
    return found | {"publish/servers": float(len(reports[-1].held_by))}
