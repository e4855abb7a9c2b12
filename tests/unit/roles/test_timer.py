"""The timer in the trainer's place: the collector accepts its requests in both modes, and its figures are right."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.monitor.server_use import ServerMeter
from minpro_megatron.monitor.step_report import StepReport
from minpro_megatron.records import (
    CollectorTotals,
    PublishLease,
    ServerAddress,
)
from minpro_megatron.roles.timer import Announcer, Timer
from minpro_megatron.serving.control import ControlError
from tests.support.collector_rig import collecting
from tests.support.direct_feed import Direct, Written
from tests.support.recorded_server import RecordedServer
from tests.support.rollout_fakes import NUM_PROMPTS, FakeServers, run_config


class Ran(msgspec.Struct):
    timer: Timer
    totals: CollectorTotals
    written: Written
    leases: list[PublishLease]


def run_timer(config: RunConfig, servers: FakeServers, lost: Sequence[int] = ()) -> Ran:
    """A run with a real collector and journal, and the timer in a thread. All servers restart when they first
    get one of the versions `lost`."""
    written, leases, losing = Written(config.run_dir), [], set(lost)

    def announce(lease: PublishLease) -> list[int]:
        leases.append(lease)
        if lease.version not in losing:
            return [server.index for server in lease.servers]
        losing.remove(lease.version)
        for server in lease.servers:
            servers.restart(server.index)
        return []

    async def main() -> tuple[Timer, CollectorTotals]:
        async with collecting(config, servers) as collector:
            source = Direct(collector, asyncio.get_running_loop())
            report = StepReport(written, lambda ids: "", 0)  # type: ignore[arg-type]
            timer = Timer(config, source, report, announce)
            return timer, await asyncio.to_thread(timer.run)

    return Ran(*asyncio.run(main()), written, leases)


@pytest.mark.parametrize("delay", [0, 1, 2, 7])
def test_delay_mode_has_the_staleness_of_the_delay(tmp_path: Path, delay: int) -> None:
    config = run_config(tmp_path, steps=5, delay=delay, evaluate_every=2)
    ran = run_timer(config, FakeServers())
    assert (ran.totals.groups_consumed, ran.totals.largest_staleness) == (5 * NUM_PROMPTS, min(delay, 4))
    assert [lease.version for lease in ran.leases] == [1, 2, 3, 4, 5]
    trained = {step: found for step, found in ran.written.steps.items() if "time/step_s" in found}
    assert [found["staleness/max"] for found in trained.values()] == [min(step, delay) for step in range(5)]
    assert {step for step, found in ran.written.steps.items() if "eval/pass_at_1" in found} == {0, 2, 4, 5}
    assert len(ran.timer.batch_seconds) == 5
    with JournalReader(config.run_dir) as reader:
        for group in reader.groups():
            for response in group.responses:
                assert response.behavior_log_probs is not None
                assert response.behavior_log_probs.tobytes() == response.rollout_log_probs.tobytes()  # type: ignore
                assert response.trained_log_probs is None


def test_bounded_mode_keeps_its_bound(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=6, max_staleness=2)
    ran = run_timer(config, FakeServers(exact=False, longest=40))
    assert ran.totals.groups_consumed == 6 * NUM_PROMPTS
    assert 0 <= ran.totals.smallest_staleness <= ran.totals.largest_staleness <= 2
    assert all(lease.requests_in_flight for lease in ran.leases)


def test_servers_that_come_back_get_the_current_version(tmp_path: Path) -> None:
    # noticed while it waits for batch 3, for version 4's evaluation before it may publish 5, and for that of the end
    config = run_config(tmp_path, steps=5, delay=1, evaluate_every=4)
    ran = run_timer(config, FakeServers(2), lost=[2, 4, 5])
    assert [lease.version for lease in ran.leases] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert all([server.index for server in lease.servers] == [0, 1] for lease in ran.leases)
    assert ran.totals.groups_consumed == 5 * NUM_PROMPTS


class Clock:
    """In the place of the module `time`: whoever sleeps does not wait, but the clock goes on."""

    def __init__(self) -> None:
        self._slept_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._slept_s

    def sleep(self, seconds: float) -> None:
        self._slept_s += seconds


def test_a_step_takes_the_given_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for module in ("roles.timer", "monitor.phases"):
        monkeypatch.setattr(f"minpro_megatron.{module}.time", clock)
    config = with_overrides(run_config(tmp_path, steps=3, delay=0), ["debug.timer_step_s=1000"])
    ran = run_timer(config, FakeServers())
    assert ran.timer.seconds["train"] == pytest.approx(3000, abs=100)
    for step in range(3):
        found = ran.written.steps[step]
        assert found["time/step_s"] == pytest.approx(1000, abs=100)
        assert found["time/wait_for_batch_s"] < 100
        assert "throughput/trained_tokens_per_s" not in found
    # with delay 0 the next batch begins with the publication: the step before is not in its time
    assert max(ran.timer.batch_seconds) < 100


def test_servers_that_never_wait_have_sampled_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for module in ("roles.timer", "monitor.phases"):
        monkeypatch.setattr(f"minpro_megatron.{module}.time", clock)
    config = with_overrides(run_config(tmp_path, steps=3, max_staleness=2), ["debug.timer_step_s=1000"])
    first, *others = run_timer(config, FakeServers(exact=False)).timer.batch_seconds
    assert first < 100
    assert others == [pytest.approx(1000, abs=100)] * 2  # what is known is that they took no longer


@pytest.fixture
def servers() -> Iterator[list[RecordedServer]]:
    made = [RecordedServer(), RecordedServer()]
    yield made
    for server in made:
        server.close()


def lease_of(servers: Sequence[RecordedServer], in_flight: bool = False) -> PublishLease:
    addresses = [ServerAddress(index=i, url=server.url, tensor_parallel=1) for i, server in enumerate(servers)]
    return PublishLease(version=4, servers=addresses, evaluations=[], requests_in_flight=in_flight)


VERSION = ("update_weight_version", {"new_version": "4", "abort_all_requests": False})


def test_servers_get_their_version_and_keep_their_weights(tmp_path: Path, servers: list[RecordedServer]) -> None:
    announce = Announcer(run_config(tmp_path))
    assert announce(lease_of(servers)) == [0, 1]
    assert all(server.received == [VERSION, ("flush_cache", {})] for server in servers)
    for server in servers:
        server.received.clear()
    assert announce(lease_of(servers, in_flight=True)) == [0, 1]  # caches in use cannot be emptied
    kept = Announcer(with_overrides(run_config(tmp_path), ["publish.flush_cache=false"]))
    assert kept(lease_of(servers)) == [0, 1]
    assert all(server.received == [VERSION, VERSION] for server in servers)


def test_a_server_that_refuses_is_left_out(
    tmp_path: Path, servers: list[RecordedServer], caplog: pytest.LogCaptureFixture
) -> None:
    servers[0].answers["update_weight_version"] = (500, "no")
    announce = Announcer(run_config(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert announce(lease_of(servers)) == [1]
    assert "version 4: excluded servers: server 0 at" in caplog.text
    servers[1].answers["flush_cache"] = (400, "busy")
    with pytest.raises(ControlError, match=r"no server accepts version 4: .*status 500: no; .*status 400: busy"):
        announce(lease_of(servers))


def test_servers_that_are_all_gone_are_waited_for(tmp_path: Path, servers: list[RecordedServer]) -> None:
    lease = lease_of(servers)
    for server in servers:
        server.close()
    assert Announcer(run_config(tmp_path))(lease) == []


def metrics(tokens: float, idle_s: float, members: float = 2) -> dict[str, float]:
    return {"fleet/tokens/0": tokens, "fleet/tokens/1": tokens, "fleet/idle_s": idle_s, "fleet/members": members}


def test_rates_are_of_the_time_in_which_there_was_work() -> None:
    meter = ServerMeter(100)
    assert meter.use([]) is None
    for now, tokens, idle_s in ((110, 500, 12), (120, 900, 16), (130, 1300, 22), (145, 1300, 52), (146, 1300, 54)):
        meter.add(metrics(tokens, idle_s), now)
    use = meter.use([1.5, 2.5])
    assert use is not None
    assert (use.num_servers, use.num_tokens, use.batch_seconds) == (2, 2600, [1.5, 2.5])
    # from 110 to 130: 2 x 800 tokens, 10 of 40 server-seconds idle
    assert (use.tokens_per_s, use.idle_share) == pytest.approx((80, 0.25))
    assert use.tokens_per_s_if_never_idle == pytest.approx(80 / 0.75)


def test_a_single_publication_has_a_rate_and_no_idle_time() -> None:
    meter = ServerMeter(100)
    meter.add(metrics(500, 12), 110)
    use = meter.use([10])
    assert use is not None
    assert (use.tokens_per_s, use.idle_share, use.tokens_per_s_if_never_idle) == (100, None, None)
