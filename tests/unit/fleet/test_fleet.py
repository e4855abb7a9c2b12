"""The fleet over real HTTP: servers that die, hang, restart, lag, lie; nothing wrong comes out and nothing is lost."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from minpro_megatron.fleet import suspension
from minpro_megatron.fleet.dispatch import Ticket
from minpro_megatron.fleet.fleet import Fleet, FleetError
from minpro_megatron.fleet.generation import GenerationError
from minpro_megatron.metrics.declared import check_declared
from minpro_megatron.serving import client as client_module
from tests.support.fake_engine import FakeEngine
from tests.support.faulty_proxy import FaultyProxy
from tests.support.running_fleet import FAULTS, INCARNATION, WATCH_INTERVAL_S, Running, config, run, running, until
from tests.support.sglang_answers import FACTS


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspension, "FIRST_SUSPENSION_S", 0.002)
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(client_module, "BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(client_module, "ABORT_TIMEOUT_S", 0.1)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_server_is_survived_and_counted(tmp_path: Path, name: str) -> None:
    fault, metric = FAULTS[name]
    limit_s = 0.15 if name == "hang" else 60

    async def test() -> None:
        async with FakeEngine("3") as broken, FakeEngine("3") as sound, FaultyProxy(broken.url) as proxy:
            proxy.fail(getattr(proxy, fault) if isinstance(fault, str) else fault, times=1000)
            async with running(tmp_path, [proxy.url, sound.url], request_timeout_s=limit_s) as it:
                await it.publish(3, [0, 1])
                await it.collect(4, version=3)
                assert it.metric(metric) == it.metric("retries") >= 1
                assert it.metric("groups") == 4
                check_declared(it.fleet.metrics())
                assert proxy.num_faults >= 1

    run(test())


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_of_the_only_server_is_survived(tmp_path: Path, name: str) -> None:
    fault, _ = FAULTS[name]
    limit_s = 0.15 if name == "hang" else 60

    async def test() -> None:
        async with FakeEngine("3") as engine, FaultyProxy(engine.url) as proxy:
            proxy.fail(getattr(proxy, fault) if isinstance(fault, str) else fault, times=1)
            async with running(tmp_path, [proxy.url], request_timeout_s=limit_s) as it:
                await it.publish(3, [0])
                await it.collect(1, version=3)
                assert proxy.num_faults == 1

    run(test())


@pytest.mark.parametrize("name", ["http_500", "nan", "stale", "truncated"])
def test_a_lasting_fault_of_all_servers_ends_the_group_with_its_cause(tmp_path: Path, name: str) -> None:
    fault, metric = FAULTS[name]
    assert not isinstance(fault, str)

    async def test() -> None:
        async with FakeEngine("3") as engine, FaultyProxy(engine.url) as one, FaultyProxy(engine.url) as other:
            one.fail(fault, times=1000)
            other.fail(fault, times=1000)
            async with running(tmp_path, [one.url, other.url]) as it:
                await it.publish(3, [0, 1])
                match = r"group 0 \(prompt 'p0'\): 3 attempts failed on servers that answer; the last one: server"
                with pytest.raises(GenerationError, match=match):
                    await it.collect(1, version=3)
                assert it.metric(metric) == 3
                assert one.num_faults >= 1
                assert other.num_faults >= 1  # the second attempt went elsewhere

    run(test())


def test_the_groups_of_a_dead_server_move_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            dying, sound = [await stack.enter_async_context(FakeEngine()) for _ in range(2)]
            it = await stack.enter_async_context(running(tmp_path, [dying.url, sound.url]))
            dying.gate.clear()
            work = asyncio.create_task(it.collect(6))
            await until(lambda: len(dying.live) == 6 and sound.num_requests == 3)
            await dying.end()
            await work
            assert sound.num_requests == 6
            await until(lambda: [address.index for address in it.fleet.members()] == [1])

    run(test())


def test_servers_that_die_under_a_group_never_fail_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(FakeEngine()) for _ in range(5)]
            it = await stack.enter_async_context(running(tmp_path, [engines[0].url]))
            work = asyncio.create_task(it.collect(1))
            for start, engine in enumerate(engines[:-1]):
                engine.gate.clear()
                await until(lambda engine=engine: engine.live)
                await engine.end()
                await until(lambda start=start: it.metric("failures/connection") == start + 1)
                engines[start + 1].gate.clear()
                it.state(0, engines[start + 1].url, start + 1)
            engines[-1].gate.set()
            await work
            assert it.metric("restarts") == 4

    run(test())


def test_tokens_of_a_newer_version_are_refused_in_delay_mode(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeEngine("0") as engine, running(tmp_path, [engine.url]) as it:
            engine.version = "1"
            with pytest.raises(GenerationError, match=r"sampled with version \[1\] instead of 0"):
                await it.collect(1)
            assert it.metric("invalid_answers/weight_versions") == 3

    run(test())


def test_the_groups_of_a_withdrawn_server_move_at_once_and_are_aborted_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "ABORT_TIMEOUT_S", 30)

    async def test() -> None:
        async with (
            FakeEngine() as leaving,
            FakeEngine() as sound,
            running(tmp_path, [leaving.url, sound.url]) as it,
        ):
            leaving.gate.clear()
            work = asyncio.create_task(it.collect(4))
            await until(lambda: len(leaving.live) == 4)
            ids = set(leaving.live)
            it.withdraw(0)
            await work
            assert it.metric("moved_groups") == 2
            assert it.metric("retries") == 0
            await until(lambda: set(leaving.aborted) == ids)

    run(test())


def test_the_groups_of_a_silent_server_move(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine() as behind,
            FakeEngine() as sound,
            FaultyProxy(behind.url) as proxy,
            running(tmp_path, [proxy.url, sound.url], unhealthy_after_s=0.15) as it,
        ):
            behind.gate.clear()
            work = asyncio.create_task(it.collect(2))
            await until(lambda: len(behind.live) == 2 and it.metric("groups") == 1)
            proxy.is_silent = True
            await work
            assert it.metric("moved_groups") >= 1  # from the other one too, if this machine is slow
            await until(lambda: [address.index for address in it.fleet.members()] == [1])

    run(test())


def test_without_a_server_work_waits_and_a_restarted_one_gets_it_once_it_is_named(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine("2") as first,
            FakeEngine("0") as second,
            running(tmp_path, [first.url]) as it,
        ):
            assert [address.start for address in it.fleet.outdated()] == [0]  # not known to be this run's version 2
            await it.publish(2, [0])
            first.gate.clear()
            work = asyncio.create_task(it.collect(1, version=2))
            await until(lambda: len(first.live) == 2)
            it.withdraw(0)
            await until(lambda: it.metric("groups_waiting") == 1)
            it.state(0, second.url, start=1)
            await until(lambda: it.metric("restarts") == 1)
            assert [(address.index, address.start) for address in it.fleet.outdated()] == [(0, 1)]
            await asyncio.sleep(0.02)
            assert not work.done()
            assert second.num_requests == 0
            second.version = "2"
            await it.publish(2, [0])
            await work
            assert it.fleet.outdated() == []

    run(test())


def test_a_server_restarted_since_it_got_the_weights_is_not_taken_for_current(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine("0") as restarted,
            FakeEngine("5") as sound,
            running(tmp_path, [restarted.url, sound.url]) as it,
        ):
            await it.publish(5, [0, 1], num_current=1)
            await it.collect(4, version=5)
            await until(lambda: [address.index for address in it.fleet.outdated()] == [0])
            assert restarted.num_requests == 0
            assert it.metric("retries") == 0

    run(test())


def test_a_server_that_loses_its_weights_behind_its_address_gets_no_work(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine("5") as engine,
            FakeEngine("5") as sound,
            running(tmp_path, [engine.url, sound.url]) as it,
        ):
            await it.publish(5, [0, 1])
            await it.collect(2, version=5)
            assert engine.num_requests == 1
            engine.version = "0"
            await it.collect(4, version=5, first=2)  # those it samples before it is found out do not count
            assert [address.index for address in it.fleet.outdated()] == [0]

    run(test())


def test_a_publication_under_way_does_not_make_a_server_outdated(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeEngine("0") as engine, running(tmp_path, [engine.url], mode="bounded") as it:
            engine.version = "1"
            await asyncio.sleep(0.04)
            assert it.fleet.outdated() == []
            (group,) = await it.collect(1, version=0)
            assert group.oldest_version == 1  # versions may rise in bounded mode
            await it.publish(1, [0])
            await it.collect(1, version=1)

    run(test())


def test_after_the_publication_at_the_start_what_a_server_reports_is_not_enough(tmp_path: Path) -> None:
    """Version 0, which a server that failed in that publication reports as the others do, and one that restarts."""

    async def test() -> None:
        async with (
            FakeEngine("0") as failed,
            FakeEngine("0") as sound,
            FakeEngine("0") as restarted,
            running(tmp_path, [failed.url, sound.url]) as it,
        ):
            assert it.fleet.outdated() == []
            await it.publish(0, [1])
            await it.collect(2)
            assert [(address.index, address.start) for address in it.fleet.outdated()] == [(0, 0)]
            it.state(0, restarted.url, start=1)
            await until(lambda: [(address.index, address.start) for address in it.fleet.outdated()] == [(0, 1)])
            await it.collect(2, first=2)
            assert (failed.num_requests, restarted.num_requests) == (0, 0)

    run(test())


def test_servers_not_named_are_outdated(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine("1") as engine,
            FakeEngine("1") as other,
            running(tmp_path, [engine.url, other.url]) as it,
        ):
            await it.publish(1, [1])
            await it.collect(3, version=1)
            assert (engine.num_requests, other.num_requests) == (0, 3)
            assert [address.index for address in it.fleet.outdated()] == [0]
            assert [address.index for address in it.fleet.members()] == [0, 1]

    run(test())


def test_groups_spread_by_load_and_at_most_so_many_are_under_way(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine() as one,
            FakeEngine() as other,
            running(tmp_path, [one.url, other.url], max_running_requests=4) as it,
        ):  # 1.25 * 4 / 2 responses a group: 2 groups each
            one.gate.clear()
            other.gate.clear()
            work = asyncio.create_task(it.collect(10))
            await until(lambda: len(one.live) == len(other.live) == 4)
            await asyncio.sleep(0.02)
            assert it.metric("groups_in_flight") == 4
            assert it.metric("groups_waiting") == 6
            one.gate.set()
            await until(lambda: one.num_requests == 8)
            other.gate.set()
            await work
            assert (one.num_requests, other.num_requests) == (8, 2)

    run(test())


def test_a_wait_below_the_limit_is_fine(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine() as engine,
            running(tmp_path, [engine.url], max_running_requests=1, queue_timeout_s=20) as it,
        ):
            engine.gate.clear()
            work = asyncio.create_task(it.collect(3))
            await until(lambda: it.metric("groups_waiting") == 2)
            await asyncio.sleep(0.02)
            engine.gate.set()
            await work
            assert it.metric("groups_waiting") == 0

    run(test())


def test_a_longer_wait_for_a_place_ends_the_group_with_one_line(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine() as engine,
            running(tmp_path, [engine.url], max_running_requests=1, queue_timeout_s=0.05) as it,
        ):
            engine.gate.clear()
            first = asyncio.create_task(it.collect(1))
            await until(lambda: it.metric("groups_in_flight") == 1)
            with pytest.raises(FleetError) as caught:
                await it.collect(1, first=1)
            assert str(caught.value) == (
                "a group has waited for server.queue_timeout_s = 0.05 s for capacity at a server that holds version 0: "
                "1 of 1 servers hold it, with 1 groups in flight, and 0 more groups wait; see the logs of serve, and "
                "if the servers are healthy raise server.queue_timeout_s or start more servers"
            )
            assert it.metric("groups_waiting") == 0
            engine.gate.set()
            await first  # longer than the limit at its server, which is not waiting for a place
            await it.collect(1, first=2)

    run(test())


def test_time_without_a_current_server_counts_as_waiting_for_a_place(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeEngine("2") as engine, running(tmp_path, [engine.url], queue_timeout_s=0.05) as it:
            assert [address.index for address in it.fleet.outdated()] == [0]
            with pytest.raises(FleetError, match=r"holds version 0: 0 of 1 servers hold it, with 0 groups in flight"):
                await it.collect(1)
            it.withdraw(0)
            await until(lambda: not it.fleet.members())
            with pytest.raises(FleetError, match=r"server\.queue_timeout_s = 0\.05 s .*: 0 of 1 servers hold it"):
                await it.collect(1)
            assert engine.num_requests == 0

    run(test())


def test_without_a_limit_a_group_waits_for_as_long_as_it_takes(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeEngine("1") as engine, running(tmp_path, [engine.url]) as it:
            work = asyncio.create_task(it.collect(1, version=1))
            await asyncio.sleep(0.1)
            assert it.metric("groups_waiting") == 1
            assert not work.done()
            await it.publish(1, [0])
            await work

    run(test())


def test_a_fleet_that_does_not_come_up_says_how_many_servers_are_missing(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine() as engine,
            Fleet(config(tmp_path, 2), FACTS, INCARNATION, watch_interval_s=WATCH_INTERVAL_S) as fleet,
        ):
            Running(config(tmp_path, 2), fleet).state(0, engine.url)
            with pytest.raises(FleetError, match=r"1 of 2 servers \(server.count = 2\) ready after 0.1 s"):
                await fleet.wait_until_ready(0.1)

    run(test())


def test_a_wrong_key_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "wrong")

    async def test() -> None:
        async def model_info(request: web.Request) -> web.Response:
            assert request.headers["Authorization"] == "Bearer wrong"
            return web.Response(status=401)

        application = web.Application()
        application.router.add_get("/model_info", model_info)
        async with TestServer(application) as server:
            made = config(tmp_path, 1, api_key_variable="THE_KEY")
            async with Fleet(made, FACTS, INCARNATION, watch_interval_s=WATCH_INTERVAL_S) as fleet:
                Running(made, fleet).state(0, str(server.make_url("")).rstrip("/"))
                with pytest.raises(FleetError, match=r"does server\.api_key_variable name the key"):
                    await fleet.wait_until_ready(5)
                with pytest.raises(FleetError):
                    await fleet.acquire(Ticket(False, 0), 1)

    run(test())


def test_a_missing_key_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(ValueError, match=r"server\.api_key_variable = 'THE_KEY': this environment variable is not set"):
        Fleet(config(tmp_path, 1, api_key_variable="THE_KEY"), FACTS, INCARNATION)
