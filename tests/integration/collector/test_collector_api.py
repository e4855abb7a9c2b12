"""The collector's HTTP interface with the trainer's feed on its other side: answers, refusals, failures, leases."""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest
import requests

from minpro_megatron import records
from minpro_megatron.collector import collector as collector_module
from minpro_megatron.collector.api import CollectorApi
from minpro_megatron.config.run import RunConfig
from minpro_megatron.feed.feed import Feed, FeedError
from minpro_megatron.feed.protocol import COLLECTOR_ENDPOINT, COLLECTOR_TOKEN
from minpro_megatron.records import Batch, CollectorTotals, PublishLease
from tests.support.collector_rig import collecting
from tests.support.rollout_fakes import FakeServers, run_config, scores_of, trained

INCARNATION = 4


async def collect(config: RunConfig, servers: FakeServers, long_poll_s: float) -> None:
    """The role collect without its processes."""
    async with CollectorApi(config.run_dir, "127.0.0.1", 0, INCARNATION, long_poll_s) as api:
        async with collecting(config, servers) as collector:
            api.serve(collector)
            while not (collector._finished or collector._changes.failure):
                await asyncio.sleep(0.005)
        await api.wait_until_failure_is_reported(5)


def run_trainer(
    config: RunConfig, servers: FakeServers, trainer: Callable[[Feed], None], long_poll_s: float = 5.0
) -> None:
    """Runs `trainer` in a thread beside the collector, and raises what it raises."""

    async def main() -> None:
        collecting_ = asyncio.create_task(collect(config, servers, long_poll_s))

        def work() -> None:
            feed = Feed(config.run_dir, INCARNATION, start_timeout_s=10)
            try:
                feed.start(0)
                trainer(feed)
            finally:
                feed.close()

        try:
            await asyncio.to_thread(work)
        finally:
            collecting_.cancel()
            with suppress(asyncio.CancelledError, RuntimeError):
                await collecting_

    asyncio.run(main())


def fetch(feed: Feed, index: int) -> Batch:
    batch = feed.batch(index)
    assert isinstance(batch, Batch)
    feed.scored(scores_of(batch))
    return batch


@pytest.mark.parametrize("long_poll_s", [5.0, 0.001])  # the second: every wait is asked for many times
def test_a_whole_run_over_http(tmp_path: Path, long_poll_s: float) -> None:
    config, servers = run_config(tmp_path, steps=3, delay=1, evaluate_every=2), FakeServers()

    def trainer(feed: Feed) -> None:
        ready = {0: fetch(feed, 0)}
        for step in range(3):
            assert {step - group.oldest_version for group in ready.pop(step).groups} == {min(step, 1)}
            feed.consumed(trained(step))
            if step < 2:
                ready[step + 1] = fetch(feed, step + 1)
            lease = feed.publish_begin(step + 1)
            assert (lease.version, lease.servers) == (step + 1, servers.members())
            feed.publish_end(step + 1, [0])
            feed.checkpoint_begin(step + 1)
            feed.checkpoint_end(step + 1)
        totals = feed.finish()
        assert isinstance(totals, CollectorTotals)
        assert (totals.groups_consumed, totals.versions_published) == (9, 3)
        assert [result.policy_version for result in totals.evaluations] == [0, 2, 3]

    run_trainer(config, servers, trainer, long_poll_s)


def test_a_run_in_turns_over_http(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=2, delay=0, placement="shared"), FakeServers(2)

    def trainer(feed: Feed) -> None:
        feed.start(0)
        for step in range(2):
            lease = feed.release_begin(step)
            assert (lease.version, lease.releases, lease.servers) == (step + 1, True, servers.members())
            feed.released(step + 1, [0, 1])
            batch = feed.batch(step)
            assert isinstance(batch, Batch)
            feed.scored(scores_of(batch))
            feed.consumed(trained(step))
            assert feed.publish_begin(step + 1) == lease
            feed.publish_end(step + 1, [0, 1])
        with pytest.raises(FeedError, match="release for version 2: the run ends with it"):
            feed.release_begin(2)
        feed.finish()

    run_trainer(config, servers, trainer)
    assert servers.kept == [[0, 1], None] * 2 + [[]]


def test_requests_out_of_order_are_refused_with_the_reason(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=4, delay=1), FakeServers()

    def refused(action: Callable[[], object], reason: str) -> None:
        with pytest.raises(FeedError, match=reason):
            action()

    def trainer(feed: Feed) -> None:
        refused(lambda: feed.start(1), "the trainer resumes from version 1, the collector from 0")
        batch = feed.batch(0)
        assert isinstance(batch, Batch)
        scores = scores_of(batch)
        refused(lambda: feed.batch(4), "the run has batches 0 .. 3")
        refused(lambda: feed.checkpoint_begin(99999), "version 99999: 0 steps have consumed their batches")
        refused(lambda: feed.checkpoint_end(99999), "version 99999: it was not started")
        refused(lambda: feed.batch(2), "later weights sample it; the servers hold version 0")
        refused(lambda: feed.consumed(trained(0)), "no behavior log-probs")
        refused(lambda: feed.consumed(trained(1)), "the next step to consume its batch is 0")
        refused(lambda: feed.publish_begin(1), "step 0 has not consumed")
        refused(lambda: feed.publish_begin(2), "the next one is 1 of 4")
        refused(lambda: feed.publish_end(1, [0]), "no lease")
        refused(feed.finish, "version 0 of 4")
        feed.scored(scores)
        refused(lambda: feed.scored(scores), "scored already")
        refused(lambda: feed.consumed(trained(0, version=1)), "staleness 1 instead of 0")
        feed.consumed(trained(0))
        refused(lambda: feed.consumed(trained(0)), "the next step to consume its batch is 1")
        refused(lambda: feed.batch(0), "consumed already")
        refused(lambda: feed.scored(scores), "not sampled yet, or consumed already")
        feed.batch(1)
        feed.publish_begin(1)
        feed.publish_begin(1)  # asking again is no harm: the first answer may have been lost
        feed.publish_end(1, [0])
        refused(lambda: feed.publish_end(1, [0]), "no lease")

    run_trainer(config, servers, trainer)


def test_a_batch_above_the_bound_is_refused(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=4, max_staleness=1), FakeServers(exact=False)

    def trainer(feed: Feed) -> None:
        batch = feed.batch(0)
        assert isinstance(batch, Batch)
        feed.scored(scores_of(batch, -1))
        with pytest.raises(FeedError, match=r"consumed with version 2: staleness 2 above staleness.max_staleness = 1"):
            feed.consumed(trained(0, version=2))
        feed.consumed(trained(0, version=1))

    run_trainer(config, servers, trainer)


def ask(feed: Feed, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, str]:
    answer = requests.request(method, f"{feed._url}/v1/{path}", data=body, headers=headers, timeout=5)
    return answer.status_code, answer.text


def test_who_cannot_read_the_run_folder_can_neither_feed_nor_drain_the_collector(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=2, delay=0), FakeServers()
    path, tokens = config.run_dir / COLLECTOR_TOKEN, []

    def trainer(feed: Feed) -> None:
        tokens.append(path.read_text())
        assert path.stat().st_mode & 0o777 == 0o600
        assert len(tokens[0]) >= 40
        assert not any(tokens[0] in file.read_text() for file in path.parent.iterdir() if file != path)
        incarnation = {"X-Run-Incarnation": str(INCARNATION)}
        batch = feed.batch(0)
        assert isinstance(batch, Batch)
        scores = records.encode(scores_of(batch))
        for wrong in ("", tokens[0][:-1], tokens[0] + "x", "\u00e9" * 3):
            headers = incarnation | {"X-Collector-Token": wrong.encode("latin-1")}
            for method, where, body in (("GET", "batch/0", b""), ("POST", "scored", scores), ("POST", "finish", b"")):
                status, told = ask(feed, method, where, headers, body)  # type: ignore[arg-type]
                assert status == 403
                assert told == "X-Collector-Token is not the token in endpoints/collector.token of this run's folder"
        assert ask(feed, "GET", "batch/0", incarnation)[0] == 403
        feed.scored(scores_of(batch))  # nobody else has

    run_trainer(config, servers, trainer)
    assert not path.exists()
    path.parent.mkdir(exist_ok=True)
    path.write_text("left over")
    path.chmod(0o644)
    run_trainer(config, servers, lambda feed: tokens.append(path.read_text()))
    assert len({*tokens, "left over"}) == 3


def test_a_trainer_without_the_token_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with CollectorApi(tmp_path, "127.0.0.1", 0, INCARNATION):
            (tmp_path / COLLECTOR_TOKEN).unlink()
            with pytest.raises(FeedError, match=r"collector.token: No such file .*must run as one user"):
                Feed(tmp_path, INCARNATION, 10)

    asyncio.run(main())


def test_damaged_requests_are_refused(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=2, delay=0), FakeServers()

    def trainer(feed: Feed) -> None:
        feed.batch(0)
        token = {"X-Collector-Token": (config.run_dir / COLLECTOR_TOKEN).read_text()}
        right, former = token | {"X-Run-Incarnation": str(INCARNATION)}, token | {"X-Run-Incarnation": "3"}

        def status(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, str]:
            return ask(feed, method, path, headers, body)

        assert status("POST", "scored", right, b"nonsense")[0] == 400
        assert status("POST", "consumed", right, json.dumps({"step": 0}).encode())[0] == 400
        assert status("POST", "publish_end/1", right, b'{"held_by": ["0"]}')[0] == 400
        assert status("POST", "publish_begin/-1", right)[0] == 404
        assert status("GET", "batch/0", {})[0] == 409
        assert status("GET", "batch/0", former) == (409, "this is incarnation 4 of the run, the request is of 3")
        assert status("POST", "publish_begin/1", former)[0] == 409

    run_trainer(config, servers, trainer)


class HeldEvaluations(FakeServers):
    held = False
    loses_next = False  # the server restarts right after the next publication

    def set_version(self, version, held_by):
        super().set_version(version, held_by)
        if self.loses_next:
            self.loses_next = False
            self.restart(0)

    async def collect(self, issued, sampling):
        while self.held and issued.batch_index == -1:
            await asyncio.sleep(0.002)
        return await super().collect(issued, sampling)


def test_leases_for_servers_that_came_back_are_distinct_from_the_requested_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector_module, "SERVER_CHECK_INTERVAL_S", 0.005)
    config, servers = run_config(tmp_path, steps=2, delay=0, evaluate_every=1), HeldEvaluations()

    def trainer(feed: Feed) -> None:
        def again(answer: object, version: int) -> None:
            """The server has lost `version`; now it gets it."""
            assert isinstance(answer, PublishLease)
            assert (answer.version, answer.servers) == (version, servers.members())
            feed.publish_end(version, [0])

        fetch(feed, 0)
        feed.consumed(trained(0))
        feed.publish_begin(1)
        servers.held, servers.loses_next = True, True
        feed.publish_end(1, [0])
        again(feed.batch(1), 1)
        fetch(feed, 1)
        feed.consumed(trained(1))
        servers.restart(0)
        again(feed.publish_begin(2), 1)
        servers.held = False
        assert feed.publish_begin(2).version == 2
        servers.held, servers.loses_next = True, True
        feed.publish_end(2, [0])
        again(feed.finish(), 2)
        servers.held = False
        assert isinstance(feed.finish(), CollectorTotals)

    run_trainer(config, servers, trainer)


def test_a_failure_reaches_the_waiting_trainer(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=3, delay=1), FakeServers()

    def trainer(feed: Feed) -> None:
        fetch(feed, 0)
        feed.batch(1)
        feed.consumed(trained(0))
        feed.publish_begin(1)
        servers.fail_with = RuntimeError("server 0: all attempts failed")
        feed.publish_end(1, [0])
        feed.batch(2)

    with pytest.raises(FeedError, match=r"^batch/2: server 0: all attempts failed; see the log of collect"):
        run_trainer(config, servers, trainer)


def test_a_trainer_that_is_early_waits_for_the_collector_or_for_its_failure(tmp_path: Path) -> None:
    async def main() -> None:
        async with CollectorApi(tmp_path, "127.0.0.1", 0, INCARNATION, long_poll_s=0.02) as api:
            feed = await asyncio.to_thread(Feed, tmp_path, INCARNATION, 10)
            with pytest.raises(FeedError, match="the collector is still starting; send `start` first"):
                await asyncio.to_thread(feed.batch, 0)
            waiting = asyncio.create_task(asyncio.to_thread(feed.start, 0))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            api.fail("no server\nis there")
            with pytest.raises(FeedError, match="start/0: no server is there; see the log of collect"):
                await waiting
            await api.wait_until_failure_is_reported(0.01)
        assert not (tmp_path / COLLECTOR_ENDPOINT).exists()

    asyncio.run(main())


def test_a_collector_that_is_gone_is_named(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=1, delay=0), FakeServers()
    feeds: list[Feed] = []
    run_trainer(config, servers, feeds.append)
    with pytest.raises(FeedError, match=r"the collector at http://127.0.0.1:\d+ does not answer"):
        feeds[0].batch(0)
    with pytest.raises(FeedError, match="no collector of incarnation 9 within 0 s"):
        Feed(config.run_dir, 9, start_timeout_s=0)


def test_the_trainer_waits_for_an_answer_as_long_as_the_run_lets_anything_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def request(session: requests.Session, method: str, url: str, *, timeout: float, **rest: object) -> NoReturn:
        limits.append(timeout)
        raise requests.ReadTimeout

    monkeypatch.setattr(requests.Session, "request", request)

    async def main() -> None:
        async with CollectorApi(tmp_path, "127.0.0.1", 0, INCARNATION):
            for hang_timeout_s in (1800, 7200):
                feed = Feed(tmp_path, INCARNATION, hang_timeout_s=hang_timeout_s)
                with pytest.raises(FeedError, match=r"does not answer \(ReadTimeout\)"):
                    feed.batch(0)
                assert limits.pop() > hang_timeout_s

    asyncio.run(main())


def test_large_records_do_not_hold_up_other_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is encoded in a thread: while that takes its time, other requests are answered."""
    config, servers = run_config(tmp_path, steps=2, delay=1), FakeServers()
    encode, encoding, go_on = records.encode, threading.Event(), threading.Event()

    def slow_encode(record: records.Record) -> bytes:
        if isinstance(record, Batch):
            encoding.set()
            assert go_on.wait(5)
        return encode(record)

    def trainer(feed: Feed) -> None:
        monkeypatch.setattr(records, "encode", slow_encode)
        waiting = threading.Thread(target=lambda: feed.batch(0))
        waiting.start()
        assert encoding.wait(5)
        feed.checkpoint_begin(0)
        assert waiting.is_alive()
        go_on.set()
        waiting.join(5)

    run_trainer(config, servers, trainer)
