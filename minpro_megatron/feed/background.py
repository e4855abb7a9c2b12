"""A batch source to which scores are sent in the background, while the trainer already continues."""

import threading
from collections.abc import Sequence

from minpro_megatron.feed.batch_source import BatchSource
from minpro_megatron.records import Batch, BehaviorLogProbs, CollectorTotals, PublishLease, TrainedStep


class BackgroundScores:
    """`feed`, except that `scored` returns at once and sends the scores in a thread.

    Every other method first waits until they are sent, so the order of the requests is the same, and a checkpoint
    still begins after the scores it relies on are stored. If sending fails, the next method raises the error, whose
    traceback shows where it was raised in the thread.

    The scores of a large batch are hundreds of megabytes, which take seconds, and all ranks would wait for rank 0.
    `consumed` is not sent in the background: the next request is `publish_begin`, which requires it. Sending only the
    log-probs of the step later would save at most 0.4 % of a step, and nothing where the trainer waits for the servers
    before it publishes (benchmarks/step_time.md).
    """

    def __init__(self, feed: BatchSource) -> None:
        self._feed = feed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def scored(self, scores: BehaviorLogProbs) -> None:
        self._wait()
        # a daemon: a trainer that fails meanwhile must not wait for the collector before it exits
        self._thread = threading.Thread(target=self._send, args=(scores,), name="scores", daemon=True)
        self._thread.start()

    def _send(self, scores: BehaviorLogProbs) -> None:
        try:
            self._feed.scored(scores)
        except BaseException as error:  # raised again in the thread of the trainer
            self._error = error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def start(self, version: int) -> None:
        self._wait()
        self._feed.start(version)

    def batch(self, index: int) -> Batch | PublishLease:
        self._wait()
        return self._feed.batch(index)

    def consumed(self, trained: TrainedStep) -> None:
        self._wait()
        self._feed.consumed(trained)

    def release_begin(self, version: int) -> PublishLease:
        self._wait()
        return self._feed.release_begin(version)

    def released(self, version: int, servers: Sequence[int]) -> None:
        self._wait()
        self._feed.released(version, servers)

    def publish_begin(self, version: int) -> PublishLease:
        self._wait()
        return self._feed.publish_begin(version)

    def publish_end(self, version: int, held_by: Sequence[int], late: Sequence[int] = ()) -> None:
        self._wait()
        self._feed.publish_end(version, held_by, late)

    def checkpoint_begin(self, version: int) -> None:
        self._wait()
        self._feed.checkpoint_begin(version)

    def checkpoint_end(self, version: int) -> None:
        self._wait()
        self._feed.checkpoint_end(version)

    def finish(self) -> CollectorTotals | PublishLease:
        self._wait()
        return self._feed.finish()

    def close(self) -> None:
        self._feed.close()
