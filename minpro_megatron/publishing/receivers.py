"""The servers that take part in a publication, and those that were excluded from it."""

import logging
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from minpro_megatron.serving.calls import PendingCalls, ServersFailed, start_for_all
from minpro_megatron.serving.control import ServerControl

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Time limits of requests that depend neither on the model nor on `publish.timeout_s`, in seconds."""

    probe_s: float = 5.0  # for a server to answer that it is alive
    clean_up_s: float = 10.0
    # For a server to compute the checksum of its weights after a failed transfer: seconds for the largest models.
    proof_s: float = 120.0
    # For a request that transfers no weights. A server needs a fraction of a second for it; one that takes this long
    # hangs, and with publish.timeout_s the trainer would wait for it as long as for the transfer of a large model.
    quick_request_s: float = 60.0
    # With requests in flight a canary waits behind them. The checksum and version of such a busy server are known.
    canary_patience_s: float = 20.0


@dataclass
class Receivers:
    """A server that dies, hangs or refuses at any request is excluded, with a line that states the reason."""

    version: int  # that is published
    controls: dict[int, ServerControl]  # of the servers without a failure so far, by index
    limits: Limits = field(default_factory=Limits)
    failures: dict[int, str] = field(default_factory=dict)  # one line per excluded server
    late: set[int] = field(default_factory=set)  # the excluded servers that hang or are broken: they are restarted
    _excluded: list[ServerControl] = field(default_factory=list)

    def each(self, method: str, *, quick: bool = False, **arguments: Any) -> dict[int, Any]:
        """The results by server; servers that fail are excluded. `quick`: see Limits.quick_request_s."""
        calls = start_for_all(self.quick() if quick else self.controls.values(), method, **arguments)
        results, late = calls.results(), calls.late()
        for index, line in calls.failures().items():
            self.exclude(index, line, is_late=index in late)
        return results

    def quick(self) -> list[ServerControl]:
        """The controls, for requests that transfer no weights."""
        return [control.at_most(self.limits.quick_request_s) for control in self.controls.values()]

    def exclude(self, index: int, line: str, is_late: bool = False) -> None:
        control = self.controls.pop(index)
        self._excluded.append(control)
        if is_late:
            self.late.add(index)
        at = f"server {index} at {control.address.url}"
        self.failures[index] = line if line.startswith(at) else f"{at}: {line}"
        log.warning("version %d: excluded: %s", self.version, self.failures[index])

    def exclude_late(self, calls: PendingCalls) -> None:
        """Excludes the servers that did not answer in time: every later request would wait as long for them. Raises
        ServersFailed if none is left."""
        calls.results()
        failed = calls.failures()
        for index in calls.late():
            self.exclude(index, failed[index], is_late=True)
        if not self.controls:
            raise ServersFailed(failed)

    def failing(self, method: str, limit_s: float, but: Container[int] = ()) -> dict[int, str]:
        """The servers that fail at `method` or do not answer it in time, except those in `but`; none is excluded."""
        asked = [control for index, control in self.controls.items() if index not in but]
        calls = start_for_all(within(limit_s, asked), method)
        calls.results()
        return calls.failures()

    def any_excluded_is_alive(self) -> bool:
        calls = start_for_all(within(self.limits.probe_s, self._excluded), "model_info")
        return bool(calls.results())

    def leave_none_paused(self, were_paused: bool) -> None:
        """Aborts the requests of excluded servers, whose weights are not verified, and lets all servers continue. Best
        effort: excluded servers may be dead."""
        excluded = within(self.limits.clean_up_s, self._excluded)
        start_for_all(excluded, "abort_all_requests").results()
        paused = within(self.limits.clean_up_s, self.controls.values()) if were_paused else []
        start_for_all([*excluded, *paused], "continue_generation").results()

    def tensor_parallel(self) -> dict[int, int]:
        """The tensor-parallel size of each server that takes part."""
        return {index: control.address.tensor_parallel for index, control in self.controls.items()}

    def lines(self, indices: Iterable[int]) -> str:
        """Why these servers were excluded."""
        return "; ".join(self.failures[index] for index in indices)


def within(timeout_s: float, controls: Iterable[ServerControl]) -> list[ServerControl]:
    """The controls with another time limit for each request."""
    return [control.within(timeout_s) for control in controls]
