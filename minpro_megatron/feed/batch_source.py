"""The source of a trainer's batches, and the reports that the trainer sends to it."""

from collections.abc import Sequence
from typing import Protocol

from minpro_megatron.records import Batch, BehaviorLogProbs, CollectorTotals, PublishLease, TrainedStep


class BatchSource(Protocol):
    """The collector (feed.feed.Feed), the journal of another run (feed.journal_feed.JournalFeed), or demonstrations
    (feed.demonstration_feed.DemonstrationFeed).

    The docstrings of Feed describe the methods and their order; each method blocks until it has its answer.
    """

    def start(self, version: int) -> None: ...

    def batch(self, index: int) -> Batch | PublishLease: ...

    def scored(self, scores: BehaviorLogProbs) -> None: ...

    def consumed(self, trained: TrainedStep) -> None: ...

    def publish_begin(self, version: int) -> PublishLease: ...

    def publish_end(self, version: int, held_by: Sequence[int], late: Sequence[int] = ()) -> None: ...

    def checkpoint_begin(self, version: int) -> None: ...

    def checkpoint_end(self, version: int) -> None: ...

    def finish(self) -> CollectorTotals | PublishLease: ...

    def close(self) -> None: ...
