"""Servers that share the trainer's GPUs: when they release their memory, which stay, and when they get weights."""

import asyncio
from pathlib import Path

import pytest

from minpro_megatron.collector import collector as collector_module
from minpro_megatron.collector import leases as leases_module
from minpro_megatron.collector.leases import Conflict
from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import CollectorTotals
from tests.support.collector_rig import Crash, FakeTrainer, HeldServers, collecting, contents
from tests.support.rollout_fakes import FakeServers, run_config, scores_of, trained

STEPS = 5
NUM_REQUESTS = 42  # of the trainer, in a run of these steps; more than there are


def shared(folder: Path, delay: int = 2, **settings) -> RunConfig:
    return run_config(folder, steps=STEPS, delay=delay, placement="shared", **settings)


def run_whole(config: RunConfig, crashes: list[int]) -> tuple[FakeTrainer, CollectorTotals, list[FakeServers]]:
    trainer, crashes, started = FakeTrainer(config), list(crashes), []

    async def incarnation() -> CollectorTotals | None:
        started.append(FakeServers(2))
        async with collecting(config, started[-1], trainer.checkpoint or 0) as collector:
            try:
                return await trainer.run(collector, crashes.pop(0) if crashes else None)
            except Crash:
                return None

    async def main() -> CollectorTotals:
        while (totals := await incarnation()) is None:
            pass
        return totals

    return trainer, asyncio.run(main()), started


@pytest.mark.parametrize("delay", [0, 1, 2, 4])
def test_the_batches_are_those_of_a_run_without_turns(tmp_path: Path, delay: int) -> None:
    apart_config = run_config(tmp_path / "apart", steps=STEPS, delay=delay, evaluate_every=2)
    (tmp_path / "apart" / "test").mkdir(parents=True)
    (tmp_path / "turns" / "test").mkdir(parents=True)
    apart, apart_totals, _ = run_whole(apart_config, [])
    turns, totals, (servers,) = run_whole(shared(tmp_path / "turns", delay, evaluate_every=2), [])
    for step in range(STEPS):
        assert contents(turns.trained[step]) == contents(apart.trained[step])
    assert totals.largest_staleness == apart_totals.largest_staleness == min(delay, STEPS - 1)
    assert totals.smallest_staleness == apart_totals.smallest_staleness
    assert [(one.policy_version, one.pass_at_1) for one in totals.evaluations] == [
        (one.policy_version, one.pass_at_1) for one in apart_totals.evaluations
    ]
    assert servers.kept == [[0, 1], None] * STEPS + [[]]
    assert [lease.version for lease in turns.leases] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("crash_at", range(NUM_REQUESTS))
def test_a_run_that_crashes_at_any_request_is_the_same_run(tmp_path: Path, crash_at: int) -> None:
    """Also while the servers' memory is the trainer's: what is started again are new servers, in their turn."""
    undisturbed, _, _ = run_whole(shared(tmp_path / "whole"), [])
    assert undisturbed.num_requests < NUM_REQUESTS
    turns, totals, started = run_whole(shared(tmp_path / "crashed"), [crash_at])
    assert totals.versions_published >= STEPS
    assert len(started) == 1 + (crash_at < undisturbed.num_requests)
    for step in range(STEPS):
        assert contents(turns.trained[step]) == contents(undisturbed.trained[step])


def test_memory_is_released_after_all_work_of_the_version(tmp_path: Path) -> None:
    async def main() -> None:
        servers = HeldServers()
        async with collecting(shared(tmp_path, evaluate_every=1), servers) as collector:
            assert await collector.release_begin(0, 0.03) is None
            servers.let_go.set()
            lease = await collector.release_begin(0, 5)
            assert lease is not None
            assert (lease.version, lease.releases) == (1, True)
            assert servers.issued
            assert await collector.release_begin(0, 5) is lease  # the first answer may have been lost
            with pytest.raises(Conflict, match="release for version 1: the servers hold version 0"):
                await collector.release_begin(1, 5)
            with pytest.raises(Conflict, match="there is no lease"):
                await collector.released(2, [0])

    asyncio.run(main())


@pytest.mark.parametrize("lost", [[1], [0, 1]])
def test_a_server_that_restarts_in_its_turn_waits_for_the_next_version_unless_it_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: list[int]
) -> None:
    monkeypatch.setattr(collector_module, "SERVER_CHECK_INTERVAL_S", 0.005)
    monkeypatch.setattr(leases_module, "REPUBLISH_PAUSE_S", 0.0)
    config = shared(tmp_path, delay=0)

    async def main() -> None:
        servers = FakeServers(2)
        async with collecting(config, servers) as collector:
            trainer = FakeTrainer(config)
            trainer._collector, trainer._crash_at, trainer._ready = collector, None, {}
            await trainer._release(0)
            await trainer._fetch(0)
            await collector.consumed(trained(0))
            await trainer._publish(1)
            for index in lost:
                servers.restart(index)
            await trainer._release(1)
            sent = [(lease.version, len(lease.servers)) for lease in trainer.leases]
            assert sent == ([(1, 2)] if len(lost) == 1 else [(1, 2), (1, 2)])
            await trainer._fetch(1)
            await collector.consumed(trained(1))
            await trainer._publish(2)
            assert servers.outdated() == []

    asyncio.run(main())


def test_a_server_that_a_turn_was_too_short_for_is_waited_for_in_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped while it started, and would be in every turn. It is not waited for longer than a start may take,
    and not again until it has joined."""
    monkeypatch.setattr(collector_module, "SERVER_CHECK_INTERVAL_S", 0.005)
    config = shared(tmp_path, delay=0)
    config = config.model_copy(update={"server": config.server.model_copy(update={"start_timeout_s": 0.2})})
    monkeypatch.setattr(collector_module, "start_limit_s", lambda server: server.start_timeout_s)

    async def main() -> None:
        servers = FakeServers(2)
        async with collecting(config, servers) as collector:
            trainer = FakeTrainer(config)
            trainer._collector, trainer._crash_at, trainer._ready = collector, None, {}

            async def step(number: int) -> None:
                await trainer._fetch(number)
                await collector.consumed(trained(number))
                await trainer._publish(number + 1)

            await trainer._release(0)
            await step(0)
            servers.withdraw(1)
            await trainer._release(1)  # it may have been starting; it is stopped
            await step(1)
            assert await collector.release_begin(2, 0.05) is None
            servers.rejoin(1)
            await trainer._release(2)
            await step(2)
            assert [len(lease.servers) for lease in trainer.leases] == [2, 1, 2]
            servers.withdraw(1)
            await trainer._release(3)
            await step(3)
            assert await collector.release_begin(4, 0.05) is None
            await asyncio.sleep(0.2)
            await trainer._release(4)
            await step(4)
            assert servers.kept == [[0, 1], None, [0], None, [0, 1], None, [0], None, [0], None]

    asyncio.run(main())


def test_servers_that_do_not_release_their_memory_are_not_kept(tmp_path: Path) -> None:
    config = shared(tmp_path, delay=0)

    async def main() -> None:
        servers = FakeServers(2)
        async with collecting(config, servers) as collector:
            lease = await collector.release_begin(0, 5)
            assert lease is not None
            await collector.released(1, [0])
            assert servers.kept == [[0]]
            batch = await collector.batch(0, 5)
            await collector.scored(scores_of(batch))  # type: ignore[arg-type]
            await collector.consumed(trained(0))
            assert await collector.publish_begin(1, 5) == lease
            await collector.publish_end(1, [0], late=[1])
            assert servers.kept == [[0], None]
            assert servers.restarts_requested == [(1, 0)]

    asyncio.run(main())
