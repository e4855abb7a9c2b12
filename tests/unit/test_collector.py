"""Whole delay-mode runs over real HTTP: collector, interface and feed, with a generator instead of servers."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import requests

from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import Batch, BehaviorLogProbs, CollectorTotals, ServerAddress
from minpro_megatron.rollout.api import CollectorApi
from minpro_megatron.rollout.collector import Collector, check_scores
from minpro_megatron.rollout.feed import Feed, FeedError
from minpro_megatron.rollout.journal import Journal
from minpro_megatron.rollout.prompts import PromptStream
from tests.unit.rollout_fakes import (
    NUM_PROMPTS,
    FakeServers,
    collected,
    run_config,
    scores_of,
    tokenized_prompts,
)

INCARNATION = 4
SERVERS = [ServerAddress(index=0, url="http://127.0.0.1:1", tensor_parallel=1)]


async def collect(config: RunConfig, servers: FakeServers, long_poll_s: float = 5.0) -> None:
    """The role collect without its processes."""
    journal = await Journal.open(config.run_dir)
    try:
        async with CollectorApi(config.run_dir, "127.0.0.1", 0, INCARNATION, long_poll_s) as api:
            collector = Collector(
                config,
                journal,
                PromptStream(tokenized_prompts(7), config),
                tokenized_prompts(2),
                servers.collect,
                SERVERS,
            )
            api.serve(collector)
            try:
                await collector.run()
            except Exception as error:
                await collector.fail(str(error))
                await api.wait_until_failure_is_told(5)
                raise
    finally:
        await journal.close()


def run_trainer(
    config: RunConfig,
    servers: FakeServers,
    trainer: Callable[[Feed], None],
    *,
    long_poll_s: float = 5.0,
    whole_run: bool = False,
) -> list[BaseException]:
    """Runs `trainer` in a thread beside the collector; what either raised, the trainer's first.

    The collector is expected to end by itself after a `whole_run`, and is terminated otherwise.
    """
    errors: list[BaseException] = []

    async def main() -> None:
        collecting = asyncio.create_task(collect(config, servers, long_poll_s))

        def work() -> None:
            feed = Feed(config.run_dir, INCARNATION, start_timeout_s=10)
            try:
                trainer(feed)
            except BaseException as error:
                errors.append(error)
            finally:
                feed.close()

        await asyncio.to_thread(work)
        if not whole_run:
            collecting.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(collecting, 5)

    try:
        asyncio.run(main())
    except Exception as error:
        errors.append(error)
    return errors


def train(config: RunConfig, servers: FakeServers, feed: Feed) -> tuple[list[Batch], CollectorTotals]:
    """The trainer's side of a whole run, in the order of the training loop."""
    delay, steps = config.staleness.delay_steps, config.num_global_steps
    ready: dict[int, Batch] = {}
    trained = []

    def fetch(index: int) -> None:
        ready[index] = feed.batch(index)
        feed.scored(scores_of(ready[index]))

    for index in range(min(delay, steps)):
        fetch(index)
    for step in range(steps):
        if step + delay < steps:
            fetch(step + delay)
        trained.append(ready.pop(step))
        feed.consumed(step, policy_version=step)
        lease = feed.publish_begin(step + 1)
        assert (lease.version, lease.servers) == (step + 1, SERVERS)
        servers.publish(lease.version)
        feed.publish_end(lease.version)
    return trained, feed.finish()


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("long_poll_s", [5.0, 0.001])  # the second: every wait is asked for many times
def test_a_run_has_the_staleness_of_the_delay_and_every_group_once(
    tmp_path: Path, delay: int, long_poll_s: float
) -> None:
    config, servers = run_config(tmp_path, steps=5, delay=delay, evaluate_every=2), FakeServers()
    outcome: list[tuple[list[Batch], CollectorTotals]] = []
    errors = run_trainer(
        config,
        servers,
        lambda feed: outcome.append(train(config, servers, feed)),
        long_poll_s=long_poll_s,
        whole_run=True,
    )
    assert errors == []
    ((trained, totals),) = outcome

    assert [batch.index for batch in trained] == list(range(5))
    for step, batch in enumerate(trained):
        assert [group.issued.group_id for group in batch.groups] == [
            step * NUM_PROMPTS + place for place in range(NUM_PROMPTS)
        ]
        assert {step - group.oldest_version for group in batch.groups} == {min(step, delay)}
    issued = [group for group in servers.issued if group.batch_index >= 0]
    assert Counter(group.group_id for group in issued) == dict.fromkeys(range(5 * NUM_PROMPTS), 1)
    # Batches start in order, also when several are sampled with one version.
    assert [group.group_id for group in issued] == list(range(5 * NUM_PROMPTS))
    assert (totals.groups_issued, totals.groups_consumed, totals.groups_dropped) == (15, 15, 0)
    assert (totals.smallest_staleness, totals.largest_staleness) == (0, delay)
    assert totals.versions_published == 5
    assert [result.policy_version for result in totals.evaluations] == [0, 2, 4, 5]
    lines = (config.run_dir / "evaluations.jsonl").read_text().splitlines()
    assert len(lines) == 4


def test_a_lease_waits_for_all_work_under_the_version_before(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=2, delay=1), FakeServers()
    held = threading.Event()
    original = servers.collect

    async def collect_slowly(issued, sampling):
        if issued.batch_index == -1:  # the evaluation of version 0 is held until the test lets it go
            await asyncio.to_thread(held.wait, 5)
        return await original(issued, sampling)

    servers.collect = collect_slowly  # type: ignore[method-assign]
    granted: list[float] = []

    def trainer(feed: Feed) -> None:
        feed.scored(scores_of(feed.batch(0)))
        feed.scored(scores_of(feed.batch(1)))
        feed.consumed(0, 0)
        asking = threading.Thread(target=lambda: granted.append(feed.publish_begin(1).version))
        asking.start()
        asking.join(0.05)
        assert granted == []
        held.set()
        asking.join(5)
        assert granted == [1]

    assert run_trainer(config, servers, trainer, long_poll_s=0.01) == []


def test_requests_out_of_order_are_refused_with_the_reason(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=4, delay=1), FakeServers()

    def refused(action: Callable[[], object], reason: str) -> None:
        with pytest.raises(FeedError, match=reason):
            action()

    def trainer(feed: Feed) -> None:
        batch = feed.batch(0)
        scores = scores_of(batch)
        refused(lambda: feed.batch(4), "the run has batches 0 .. 3")
        refused(lambda: feed.batch(2), "sampled with version 1; the servers hold 0")
        refused(lambda: feed.consumed(0, 0), "no behavior log-probs")
        refused(lambda: feed.consumed(1, 1), "the next step to consume its batch is 0")
        refused(lambda: feed.publish_begin(1), "step 0 has not consumed")
        refused(lambda: feed.publish_begin(2), "the servers hold 0 of 4")
        refused(lambda: feed.publish_end(1), "no lease")
        refused(feed.finish, "version 0 of 4")
        feed.scored(scores)
        refused(lambda: feed.scored(scores), "scored already")
        refused(lambda: feed.consumed(0, 1), "staleness 1 instead of 0")
        feed.consumed(0, 0)
        refused(lambda: feed.consumed(0, 0), "the next step to consume its batch is 1")
        refused(lambda: feed.batch(0), "consumed already")
        feed.publish_begin(1)
        feed.publish_begin(1)  # asking again is no harm: the first answer may have been lost
        servers.publish(1)
        feed.publish_end(1)
        refused(lambda: feed.publish_end(1), "no lease")

    assert run_trainer(config, servers, trainer) == []


def test_damaged_requests_are_refused(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=2, delay=0), FakeServers()

    def trainer(feed: Feed) -> None:
        feed.batch(0)
        headers = {"X-Run-Incarnation": str(INCARNATION)}
        answers = [
            requests.post(f"{feed._url}/v1/scored", data=b"nonsense", headers=headers, timeout=5),
            requests.post(f"{feed._url}/v1/consumed/0", data=b'{"policy_version": "0"}', headers=headers, timeout=5),
            requests.post(f"{feed._url}/v1/consumed/-1", data=b"", headers=headers, timeout=5),
            requests.get(f"{feed._url}/v1/batch/0", headers={"X-Run-Incarnation": "3"}, timeout=5),
            requests.get(f"{feed._url}/v1/batch/0", timeout=5),
        ]
        assert [answer.status_code for answer in answers] == [400, 400, 404, 409, 409]
        assert answers[3].text == "this is incarnation 4 of the run, the request is of 3"

    assert run_trainer(config, servers, trainer) == []


def test_a_failure_reaches_the_waiting_trainer_and_ends_the_collector(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=3, delay=1), FakeServers()

    def trainer(feed: Feed) -> None:
        feed.scored(scores_of(feed.batch(0)))
        feed.batch(1)
        feed.consumed(0, 0)
        feed.publish_begin(1)
        servers.publish(1)
        servers.fail_with = RuntimeError("server 0: all attempts failed")
        feed.publish_end(1)
        feed.batch(2)

    told, raised = run_trainer(config, servers, trainer, whole_run=True)
    assert isinstance(told, FeedError)
    assert str(told).startswith("batch/2: server 0: all attempts failed; see the log of collect")
    assert raised is servers.fail_with


def test_a_collector_that_is_gone_is_named(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=1, delay=0), FakeServers()
    feeds: list[Feed] = []

    def trainer(feed: Feed) -> None:
        feeds.append(feed)
        raise KeyError("the trainer ends early")

    run_trainer(config, servers, trainer)
    with pytest.raises(FeedError, match=r"the collector at http://127.0.0.1:\d+ does not answer"):
        feeds[0].batch(0)
    with pytest.raises(FeedError, match="no collector of incarnation 9 within 0 s"):
        Feed(config.run_dir, 9, start_timeout_s=0)


def scored_batch(tmp_path: Path) -> tuple[Batch, BehaviorLogProbs]:
    issued = PromptStream(tokenized_prompts(7), run_config(tmp_path)).groups(0, 0)
    batch = Batch(index=0, groups=[collected(group) for group in issued])
    return batch, scores_of(batch)


def test_scores_must_fit_the_batch(tmp_path: Path) -> None:
    batch, scores = scored_batch(tmp_path)
    check_scores(batch, scores)
    values = [[array.copy() for array in responses] for responses in scores.log_probs]

    def refused(log_probs: list[list[np.ndarray]], reason: str, version: int = 0) -> None:
        with pytest.raises(ValueError, match=reason):
            check_scores(batch, BehaviorLogProbs(index=0, policy_version=version, log_probs=log_probs))

    refused(values, "computed with version 1, sampled with version 0", version=1)
    refused(values[:-1], "2 groups instead of 3")
    refused([values[0][:-1], *values[1:]], "group 0: 1 responses instead of 2")
    refused([*values[:-1], [values[-1][0], values[-1][1][:-1]]], "group 2, response 1: float32 of shape")
    refused([[values[0][0].astype(np.float64), values[0][1]], *values[1:]], "response 0: float64")
    for wrong in (np.nan, -np.inf, 0.5):
        damaged = [[array.copy() for array in responses] for responses in values]
        damaged[1][0][0] = wrong
        refused(damaged, "group 1, response 0: a value is not finite, or above 0")
