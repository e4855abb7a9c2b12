"""Servers that are busy, lose their weights, refuse them, or are not there: what may be published to whom, and when."""

import asyncio
from pathlib import Path

import pytest

from minpro_megatron.collector import collector as collector_module
from minpro_megatron.collector import leases as leases_module
from minpro_megatron.collector.collector import Collector
from minpro_megatron.collector.leases import Conflict
from minpro_megatron.records import Batch, CollectorTotals, PublishLease
from tests.support.collector_rig import FakeTrainer, HeldServers, collecting
from tests.support.rollout_fakes import FakeServers, run_config, scores_of, trained


def test_a_lease_waits_for_all_work_under_the_version_before(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=2, delay=1)

    class SlowEvaluation(HeldServers):
        async def collect(self, issued, sampling):
            held = issued.batch_index == -1
            return await (super().collect if held else super(HeldServers, self).collect)(issued, sampling)

    async def main() -> None:
        servers = SlowEvaluation()
        async with collecting(config, servers) as collector:
            for index in range(2):
                batch = await collector.batch(index, 5)
                assert isinstance(batch, Batch)
                await collector.scored(scores_of(batch))
            await collector.consumed(trained(0))
            assert await collector.publish_begin(1, 0.03) is None
            servers.let_go.set()
            lease = await collector.publish_begin(1, 5)
            assert lease is not None
            assert lease.version == 1

    asyncio.run(main())


PAUSE_S = 1000.0


async def first_publication(collector: Collector, held_by: list[int]) -> None:
    for index in range(2):
        batch = await collector.batch(index, 5)
        assert isinstance(batch, Batch)
        await collector.scored(scores_of(batch))
    await collector.consumed(trained(0))
    await collector.publish_begin(1, 5)
    await collector.publish_end(1, held_by)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the servers every few milliseconds; the pause ends when a test says so."""
    monkeypatch.setattr(collector_module, "SERVER_CHECK_INTERVAL_S", 0.005)
    monkeypatch.setattr(leases_module, "REPUBLISH_PAUSE_S", PAUSE_S)


def let_the_pause_pass(collector: Collector) -> None:
    not_before = collector._leases._not_before
    not_before |= {server: when - PAUSE_S for server, when in not_before.items()}


@pytest.mark.usefixtures("impatient")
def test_a_server_that_comes_back_gets_the_current_weights_before_anything_else(tmp_path: Path) -> None:
    """Whatever the trainer asks for: a lease of the current version comes first, for that server alone."""
    config = run_config(tmp_path, steps=2, delay=1, evaluate_every=1)

    async def lease_of(answer: object, version: int, servers: FakeServers, index: int) -> None:
        assert isinstance(answer, PublishLease)
        assert (answer.version, answer.servers) == (version, [servers.address(index)])
        assert not answer.requests_in_flight
        assert answer.metrics["fleet/members"] == 2

    async def main() -> None:
        servers = HeldServers(count=2)
        servers.let_go.set()
        async with collecting(config, servers) as collector:
            await first_publication(collector, [0, 1])
            servers.let_go.clear()  # the evaluation of version 1 goes on until the end
            servers.restart(1)
            await collector.consumed(trained(1))
            await lease_of(await collector.publish_begin(2, 5), 1, servers, 1)
            await lease_of(await collector.publish_begin(2, 5), 1, servers, 1)  # the first answer may be lost
            await collector.publish_end(1, [1])
            assert servers.outdated() == []
            assert await collector.publish_begin(2, 0.02) is None
            servers.let_go.set()
            lease = await collector.publish_begin(2, 5)
            assert lease is not None
            assert (lease.version, lease.servers) == (2, servers.members())
            servers.let_go.clear()
            await collector.publish_end(2, [0, 1])
            servers.restart(0)
            await lease_of(await collector.finish(5), 2, servers, 0)
            await collector.publish_end(2, [0])
            servers.let_go.set()
            assert isinstance(await collector.finish(5), CollectorTotals)

    asyncio.run(main())


@pytest.mark.usefixtures("impatient")
def test_a_waiting_batch_is_interrupted_where_a_server_has_lost_the_weights(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=4, delay=1)

    async def main() -> None:
        servers = HeldServers(count=1)
        servers.let_go.set()
        async with collecting(config, servers) as collector:
            await first_publication(collector, [0])
            servers.let_go.clear()
            waiting = asyncio.create_task(collector.batch(2, 5))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            servers.restart(0)
            lease = await waiting
            assert isinstance(lease, PublishLease)
            assert lease.version == 1
            servers.let_go.set()
            await collector.publish_end(1, [0])
            batch = await collector.batch(2, 5)
            assert isinstance(batch, Batch)
            assert {group.oldest_version for group in batch.groups} == {1}

    asyncio.run(main())


@pytest.mark.usefixtures("impatient")
def test_a_server_that_did_not_take_the_weights_is_asked_again_after_a_pause(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=4, delay=1)

    async def main() -> None:
        servers = HeldServers(count=2)
        servers.let_go.set()
        async with collecting(config, servers) as collector:
            servers_at_once = servers.members()
            await first_publication(collector, [1])
            servers.let_go.clear()
            assert [server.index for server in servers.outdated()] == [0]
            assert await collector.batch(2, 0.02) is None
            let_the_pause_pass(collector)
            lease = await collector.batch(2, 5)
            assert isinstance(lease, PublishLease)
            assert (lease.version, lease.servers) == (1, servers_at_once[:1])
            await collector.publish_end(1, [])  # again not
            assert [server.index for server in servers.outdated()] == [0]
            assert await collector.batch(2, 0.02) is None
            servers.restart(0)  # another server now, so it is asked at once
            lease = await collector.batch(2, 5)
            assert isinstance(lease, PublishLease)
            assert [(server.index, server.start) for server in lease.servers] == [(0, 1)]
            await collector.publish_end(1, [0])
            assert servers.outdated() == []

    asyncio.run(main())


@pytest.mark.usefixtures("impatient")
def test_a_publication_waits_for_a_server_to_be_there(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=2, delay=0)

    async def main() -> None:
        servers = FakeServers()
        async with collecting(config, servers) as collector:
            batch = await collector.batch(0, 5)
            assert isinstance(batch, Batch)
            await collector.scored(scores_of(batch))
            await collector.consumed(trained(0))
            while servers.in_flight:
                await asyncio.sleep(0)
            servers.withdraw(0)
            assert await collector.publish_begin(1, 0.02) is None

    asyncio.run(main())


def test_after_a_resume_nothing_is_sampled_before_the_servers_hold_the_checkpoint(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=2, delay=0)
    longer = config.model_copy(update={"num_global_steps": 4})

    async def main() -> None:
        trainer = FakeTrainer(config)
        async with collecting(config, FakeServers()) as collector:
            await trainer.run(collector)
        servers = FakeServers()
        async with collecting(longer, servers, version=2) as collector:
            collector.start(2)
            assert await collector.batch(2, 0.02) is None
            assert servers.issued == []
            with pytest.raises(Conflict, match="publish version 3: the next one is 2 of 4"):
                await collector.publish_begin(3, 5)
            lease = await collector.publish_begin(2, 5)
            assert lease is not None
            assert (lease.version, lease.requests_in_flight) == (2, False)
            await collector.publish_end(2, [0])
            assert isinstance(await collector.batch(2, 5), Batch)
            assert {group.policy_version for group in servers.issued if group.batch_index >= 0} == {2}

    asyncio.run(main())
