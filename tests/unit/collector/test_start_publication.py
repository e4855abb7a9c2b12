"""A new run publishes version 0 before its servers sample anything."""

import asyncio
from pathlib import Path

import pytest

from minpro_megatron.collector import collector as collector_module
from minpro_megatron.collector import leases as leases_module
from minpro_megatron.collector.changes import CollectorFailed
from minpro_megatron.collector.leases import Conflict
from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import Batch, PublishLease
from tests.support.collector_rig import collecting
from tests.support.rollout_fakes import FakeServers, run_config

LONG_S = 60.0  # for what is ready in milliseconds: a busy machine needs longer


@pytest.mark.parametrize("bound", [0, 2])
def test_nothing_is_sampled_before_version_0_has_arrived(tmp_path: Path, bound: int) -> None:
    config = run_config(tmp_path, max_staleness=bound, evaluate_every=1, at_start=True)

    async def main() -> None:
        servers = FakeServers(count=2, exact=not bound)
        async with collecting(config, servers) as collector:
            collector.start(0)
            assert await collector.batch(0, 0.02) is None
            assert servers.issued == []
            with pytest.raises(Conflict, match="publish version 1: the next one is 0 of 5"):
                await collector.publish_begin(1, 5)
            lease = await collector.publish_begin(0, 5)
            assert lease is not None
            assert (lease.version, len(lease.servers), lease.requests_in_flight) == (0, 2, False)
            await collector.publish_end(0, [0, 1])
            batch = await collector.batch(0, LONG_S)
            assert isinstance(batch, Batch)
            assert {group.oldest_version for group in batch.groups} == {0}
            assert any(group.is_evaluation for group in servers.issued)

    asyncio.run(main())


def test_a_server_that_does_not_take_version_0_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them: as behind a firewall, where the servers are restarted and then load from disk."""
    monkeypatch.setattr(collector_module, "SERVER_CHECK_INTERVAL_S", 0.005)
    monkeypatch.setattr(leases_module, "REPUBLISH_PAUSE_S", 0.02)

    async def main() -> None:
        servers = FakeServers(count=1)
        async with collecting(run_config(tmp_path, at_start=True), servers) as collector:
            collector.start(0)
            await collector.publish_begin(0, 5)
            await collector.publish_end(0, [], late=[0])
            assert servers.restarts_requested == [(0, 0)]
            servers.restart(0)
            lease = await collector.batch(0, LONG_S)
            assert isinstance(lease, PublishLease)
            assert (lease.version, [server.start for server in lease.servers]) == (0, [1])
            await collector.publish_end(0, [0])
            assert isinstance(await collector.batch(0, LONG_S), Batch)

    asyncio.run(main())


def test_a_new_run_does_not_wait_for_ever_for_servers_that_do_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = impatient(tmp_path, monkeypatch)

    async def main() -> None:
        servers = FakeServers(count=1)
        servers.withdraw(0)
        async with collecting(config, servers) as collector:
            collector.start(0)
            with pytest.raises(
                CollectorFailed, match=r"no server has answered for 0\.3 s .* version 0 is not published"
            ):
                await collector.publish_begin(0, LONG_S)

    asyncio.run(main())


def test_a_trainer_that_loads_for_long_is_no_fault_of_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it publishes, no server holds what the run calls version 0."""
    config = impatient(tmp_path, monkeypatch)

    async def main() -> None:
        servers = FakeServers(count=1)
        servers.restart(0)
        servers.set_version(0, [])
        async with collecting(config, servers) as collector:
            collector.start(0)
            for _ in range(20):  # longer than the limit
                assert await collector.batch(0, 0.03) is None
            assert await collector.publish_begin(0, LONG_S) is not None

    asyncio.run(main())


def impatient(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Servers have 0.3 s."""
    monkeypatch.setattr(collector_module, "SERVER_CHECK_INTERVAL_S", 0.005)
    config = run_config(folder, at_start=True)
    return config.model_copy(update={"server": config.server.model_copy(update={"start_timeout_s": 0.1})})
