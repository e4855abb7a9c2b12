"""Servers that answer and do no work: they get none, are not published to, and are started again."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from minpro_megatron.collector.leases import Leases
from minpro_megatron.fleet import generation_watch
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.generation_watch import GenerationWatch
from minpro_megatron.metrics.declared import check_declared
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving import health
from minpro_megatron.serving.client import ServerClient
from minpro_megatron.serving.control import ControlError, ServerControl
from minpro_megatron.serving.endpoints import restart_requested
from minpro_megatron.serving.errors import InvalidAnswer
from minpro_megatron.serving.health import Health, ask, ask_to_generate
from tests.support.fake_engine import FakeEngine
from tests.support.rollout_fakes import no_evaluations
from tests.support.running_fleet import INCARNATION, Running, run, running, until
from tests.support.sglang_answers import FACTS, PROMPT


def members(fleet: Fleet) -> list[int]:
    return [server.index for server in fleet.members()]


def requested(it: Running, index: int, start: int = 0) -> str | None:
    return restart_requested(it.settings.run_dir, index, start, INCARNATION)


def test_a_server_that_hangs_loses_its_work_and_is_started_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine() as sound,
            FakeEngine() as hanging,
            running(tmp_path, [sound.url, hanging.url], generation_timeout_s=0.2) as it,
        ):
            hanging.gate.clear()
            work = asyncio.create_task(it.collect(2))
            await until(lambda: hanging.live)
            hanging.hangs = True
            await until(lambda: requested(it, 1))
            await work  # its group has moved
            assert sound.num_requests == 2
            reason = "it answers, but has generated nothing for server.generation_timeout_s = 0.2 s"
            assert (requested(it, 1), requested(it, 0)) == (reason, None)
            assert (members(it.fleet), it.metric("hung")) == ([0], 1)
            check_declared(it.fleet.metrics())
            hanging.hangs = False  # a server that was given up does not come back by itself
            await asyncio.sleep(0.05)
            assert members(it.fleet) == [0]
            it.withdraw(1)
            hanging.gate.set()
            it.state(1, hanging.url, start=1)
            await until(lambda: members(it.fleet) == [0, 1])
            assert (requested(it, 1, start=1), it.metric("hung")) == (None, 1)

    run(test())


def test_a_server_is_not_published_to_from_the_first_token_on_that_does_not_come(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine() as first,
            FakeEngine() as second,
            running(tmp_path, [first.url, second.url], generation_timeout_s=60) as it,
        ):
            leases = Leases(it.fleet, [PROMPT], no_evaluations())
            second.hangs = True
            await until(lambda: members(it.fleet) == [0])
            leases.grant(1, requests_in_flight=False)
            assert leases.current is not None
            assert [server.index for server in leases.current.servers] == [0]
            second.hangs = False
            await until(lambda: members(it.fleet) == [0, 1])
            assert requested(it, 1) is None

    run(test())


def test_a_server_that_the_trainer_has_paused_does_not_hang(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeEngine() as engine, running(tmp_path, [engine.url], generation_timeout_s=0.05) as it:
            leases = Leases(it.fleet, [PROMPT], no_evaluations())
            leases.grant(1, requests_in_flight=True)
            engine.hangs = True
            await asyncio.sleep(0.2)
            assert (members(it.fleet), requested(it, 0)) == ([0], None)
            engine.hangs, engine.version = False, "1"
            leases.end([0], first_time=True)
            await until(lambda: it.metric("current") == 1)
            engine.hangs = True  # and from now on it counts again
            await until(lambda: requested(it, 0))

    run(test())


def test_a_server_that_was_late_for_the_trainer_is_started_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            FakeEngine() as first,
            FakeEngine() as second,
            FakeEngine() as third,
            running(tmp_path, [first.url, second.url, third.url]) as it,
        ):
            leases = Leases(it.fleet, [PROMPT], no_evaluations())
            leases.grant(1, requests_in_flight=False)
            # the third has failed, but not by being late
            leases.end([0], first_time=True, late=[1])
            assert members(it.fleet) == [0, 2]
            assert requested(it, 1) == "late with an answer while version 1 was published"
            assert (requested(it, 0), requested(it, 2)) == (None, None)

    run(test())


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(generation_watch, "time", SimpleNamespace(monotonic=lambda: self.now))


def asked(watch: GenerationWatch, answer: bool) -> bool | None:
    async def generates() -> bool:
        return answer

    return asyncio.run(watch.ask(generates))


def test_silence_counts_from_the_last_sign_of_life_and_not_once_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = GenerationWatch()
    assert not watch.is_due(5)
    clock.now += 5
    assert watch.is_due(5)
    clock.now += 1000  # the collector was held up: one question in vain proves nothing
    assert asked(watch, False) is False
    assert (watch.is_well, watch.is_silent_for(300)) == (False, False)
    clock.now += 5
    asked(watch, False)
    assert watch.is_silent_for(300)
    watch.seen()  # a group has come
    assert (watch.is_well, watch.is_silent_for(300)) == (True, False)
    clock.now += 200
    asked(watch, False)
    clock.now += 99
    asked(watch, False)
    assert not watch.is_silent_for(300)
    clock.now += 2
    assert watch.is_silent_for(300)


def test_an_answer_from_before_a_publication_says_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = GenerationWatch()

    async def lent_meanwhile() -> bool:
        watch.suspend()
        watch.resume()
        return False

    assert asyncio.run(watch.ask(lent_meanwhile)) is None
    assert watch.is_well
    asked(watch, False)
    clock.now += 400
    asked(watch, False)
    watch.resume()  # it was not leased: another server's publication is no sign of life
    assert watch.is_silent_for(300)
    watch.suspend()
    clock.now += 400
    assert not watch.is_due(5)
    watch.resume()
    assert not watch.is_silent_for(300)


@pytest.mark.parametrize(("status", "generates"), [(200, True), (503, False), (500, False), (404, True)])
def test_what_the_answers_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, generates: bool) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status)

    async def model_info(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": "0"})

    async def test() -> None:
        application = web.Application()
        application.router.add_get("/health_generate", answer)
        application.router.add_get("/model_info", model_info)
        async with TestServer(application) as server:
            url = str(server.make_url("")).rstrip("/")
            async with ServerClient(ServerAddress(index=0, url=url, tensor_parallel=1), FACTS, 5) as client:
                assert await client.generates(5) is generates
            found = await asyncio.to_thread(ask_to_generate, url, {}, 5)
            assert found is (Health.ANSWERS if generates else Health.SILENT)
        async with ServerClient(ServerAddress(index=0, url=url, tensor_parallel=1), FACTS, 5) as client:
            assert await client.generates(5) is False  # nobody is there any more

    monkeypatch.setattr(health, "GENERATION_TIMEOUT_S", 5.0)
    run(test())


def test_an_answer_without_end_is_read_to_its_limit_only() -> None:
    num_sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal num_sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 16384)
            num_sent += 1

    async def test() -> None:
        application = web.Application()
        application.router.add_get("/model_info", endless)
        async with TestServer(application) as server:
            url = str(server.make_url("")).rstrip("/")
            address = ServerAddress(index=0, url=url, tensor_parallel=1)
            assert await asyncio.to_thread(ask, url, {}, 30) is Health.SILENT
            async with ServerClient(address, FACTS, 5) as client:
                with pytest.raises(InvalidAnswer, match="more than 65536 bytes"):
                    await client.policy_version(30)
            with pytest.raises(ControlError, match="more than 65536 bytes"):
                await asyncio.to_thread(ServerControl(address, 30).model_info)

    run(test())
    assert 15 <= num_sent < 3000  # what the ends of the three connections hold beside
