"""The events of a collector that an observer, such as a trace, may record."""

from collections.abc import Sequence


class CollectorObserver:
    """Receives the events of a collector, in its event loop. The methods do nothing: override those that matter. They
    must return at once and raise nothing, because the run waits for them."""

    def resumed(self, version: int) -> None:
        """The collector resumes from the checkpoint of `version`; 0: from the start of the run."""

    def lease_requested(self, version: int) -> None:
        """The trainer asks for a lease of `version`; it repeats the request while it waits."""

    def lease_granted(self, version: int) -> None:
        """There is a lease of `version`: a new version, or the current one for servers that lost it. The event is
        repeated while that lease is waited for."""

    def published(self, version: int, held_by: Sequence[int]) -> None:
        """The lease of `version` has ended: the servers of these indices hold it."""

    def evaluation_started(self, version: int, name: str) -> None:
        """The evaluation of the weights of `version` on the prompts `name` starts (HELDOUT, or a benchmark)."""

    def evaluation_ended(self, version: int, name: str) -> None:
        """That evaluation has ended, with a result or with a failure that was reported."""
