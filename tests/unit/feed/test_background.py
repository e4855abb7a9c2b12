"""Scores are sent while the trainer continues, before any other request, and a failure is raised by the next one."""

import threading
import traceback
from collections.abc import Callable
from typing import Any, cast

import pytest

from minpro_megatron.feed.background import BackgroundScores
from minpro_megatron.feed.batch_source import BatchSource
from minpro_megatron.feed.feed import FeedError
from minpro_megatron.records import BehaviorLogProbs, TrainedStep

SCORES = BehaviorLogProbs(index=0, policy_version=0, log_probs=[])
LIMIT_S = 10
REQUESTS: dict[str, tuple[Any, ...]] = {
    "start": (0,),
    "batch": (1,),
    "scored": (SCORES,),
    "consumed": (TrainedStep(step=0, policy_version=0),),
    "publish_begin": (1,),
    "publish_end": (1, [0]),
    "checkpoint_begin": (1,),
    "checkpoint_end": (1,),
    "finish": (),
}


class Recorder:
    """A BatchSource whose first `scored` ends when `release` is called."""

    def __init__(self, error: Exception | None = None) -> None:
        self.called: list[str] = []
        self._may_end, self._error = threading.Event(), error

    def release(self) -> None:
        self._may_end.set()

    def scored(self, scores: BehaviorLogProbs) -> None:
        assert self._may_end.wait(LIMIT_S)
        if self._error is not None:
            raise self._error
        self.called.append("scored")

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.called.append(name)


def test_scored_returns_before_the_scores_are_sent() -> None:
    recorder = Recorder()
    BackgroundScores(cast(BatchSource, recorder)).scored(SCORES)
    assert recorder.called == []
    recorder.release()


@pytest.mark.parametrize("name", REQUESTS)
def test_every_other_request_is_made_after_the_scores_are_sent(name: str) -> None:
    recorder = Recorder()
    feed = BackgroundScores(cast(BatchSource, recorder))
    feed.scored(SCORES)
    released = threading.Timer(0.01, recorder.release)
    released.start()
    getattr(feed, name)(*REQUESTS[name])
    feed.start(0)  # after a second `scored` too
    assert recorder.called[:2] == ["scored", name]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_failure_is_raised_by_the_next_request_with_its_own_traceback(name: str) -> None:
    recorder = Recorder(FeedError("scored: refused"))
    feed = BackgroundScores(cast(BatchSource, recorder))
    recorder.release()
    feed.scored(SCORES)
    with pytest.raises(FeedError, match="scored: refused") as caught:
        getattr(feed, name)(*REQUESTS[name])
    assert "raise self._error" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert recorder.called == []
    feed.start(0)  # it is raised once
