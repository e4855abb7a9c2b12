"""Work and idle time of the rollout servers, from the metrics that the collector reports with each lease."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minpro_megatron.config.base import Section


class ServerUse(Section):
    """The work of a run's servers.

    Rates and shares cover the time from the first publication to the last publication before which tokens were sampled.
    This excludes the start of the servers and the last steps, for which they have nothing to do. If this interval is
    empty, the values cover the time since the trainer's start, and those that need the idle time are None.
    """

    num_servers: float  # responding servers, on average
    num_tokens: int  # sampled in the entire run, including held-out responses
    tokens_per_s: float
    idle_share: float | None  # of the servers' time
    tokens_per_s_if_never_idle: float | None
    batch_seconds: list[float]  # see the role that measures them


@dataclass(frozen=True)
class _Sample:
    time_s: float
    num_tokens: float
    idle_s: float
    num_servers: float


class ServerMeter:
    """Collects the metrics of a run's leases."""

    def __init__(self, now_s: float) -> None:
        """`now_s`, as all times here, is the time of one monotonic clock, in seconds."""
        self._start_s = now_s
        self._samples: list[_Sample] = []

    def add(self, metrics: Mapping[str, float], now_s: float) -> None:
        """Adds the metrics of a lease that was granted at `now_s`."""
        tokens = sum(value for name, value in metrics.items() if name.startswith("fleet/tokens/"))
        idle_s, servers = metrics.get("fleet/idle_s", 0.0), metrics.get("fleet/members", 0.0)
        self._samples.append(_Sample(now_s, tokens, idle_s, servers))

    def use(self, batch_seconds: Sequence[float]) -> ServerUse | None:
        """The values so far; None before the first lease."""
        if not self._samples:
            return None
        first, last = self._samples[0], self._last_that_grew()
        window_s, tokens = last.time_s - first.time_s, last.num_tokens - first.num_tokens
        servers = sum(sample.num_servers for sample in self._samples) / len(self._samples)
        idle_share = None
        if last is first:
            window_s, tokens = first.time_s - self._start_s, first.num_tokens
        elif servers > 0:
            idle_share = min(1.0, max(0.0, (last.idle_s - first.idle_s) / (window_s * servers)))
        rate = tokens / max(window_s, 1e-9)
        return ServerUse(
            num_servers=servers,
            num_tokens=round(self._samples[-1].num_tokens),
            tokens_per_s=rate,
            idle_share=idle_share,
            tokens_per_s_if_never_idle=None if idle_share in (None, 1.0) else rate / (1 - idle_share),
            batch_seconds=list(batch_seconds),
        )

    def _last_that_grew(self) -> _Sample:
        """The last lease at which the number of sampled tokens had grown."""
        found = self._samples[0]
        for before, sample in zip(self._samples, self._samples[1:], strict=False):
            if sample.num_tokens > before.num_tokens:
                found = sample
        return found
