"""A timer's surroundings without HTTP and without files: the collector in another thread, and a writer that keeps what
it is given."""

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from minpro_megatron.collector.collector import Collector
from minpro_megatron.records import Batch, BehaviorLogProbs, CollectorTotals, PublishLease, TrainedStep

TIMEOUT_S = 5.0


class Direct:
    """A BatchSource: the collector itself, in another thread's event loop."""

    def __init__(self, collector: Collector, loop: asyncio.AbstractEventLoop) -> None:
        self._collector, self._loop = collector, loop

    def _wait[Result](self, request: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(request, self._loop).result(TIMEOUT_S)

    def start(self, version: int) -> None:
        self._collector.start(version)

    def batch(self, index: int) -> Batch | PublishLease:
        answer = self._wait(self._collector.batch(index, TIMEOUT_S))
        assert answer is not None, "the batch did not come"
        return answer

    def scored(self, scores: BehaviorLogProbs) -> None:
        self._wait(self._collector.scored(scores))

    def consumed(self, trained: TrainedStep) -> None:
        self._wait(self._collector.consumed(trained))

    def release_begin(self, version: int) -> PublishLease:
        lease = self._wait(self._collector.release_begin(version, TIMEOUT_S))
        assert lease is not None, "the lease did not come"
        return lease

    def released(self, version: int, servers: Sequence[int]) -> None:
        self._wait(self._collector.released(version, servers))

    def publish_begin(self, version: int) -> PublishLease:
        lease = self._wait(self._collector.publish_begin(version, TIMEOUT_S))
        assert lease is not None, "the lease did not come"
        return lease

    def publish_end(self, version: int, held_by: Sequence[int], late: Sequence[int] = ()) -> None:
        self._wait(self._collector.publish_end(version, held_by))

    def checkpoint_begin(self, version: int) -> None: ...

    def checkpoint_end(self, version: int) -> None: ...

    def finish(self) -> CollectorTotals | PublishLease:
        answer = self._wait(self._collector.finish(TIMEOUT_S))
        assert answer is not None, "the last evaluation did not end"
        return answer

    def close(self) -> None: ...


class Written:
    """Replaces a RunWriter and records its calls."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.steps: dict[int, dict[str, float]] = {}

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.setdefault(step, {}).update(metrics)

    def histogram(self, *_: object) -> None: ...

    def text(self, *_: object) -> None: ...
