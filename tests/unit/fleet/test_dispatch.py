"""Who gets the next group: by load, the slow and the failing last, whoever waits longest first; nothing is lost."""

import asyncio
import random
import statistics
from types import SimpleNamespace

import pytest

from minpro_megatron.fleet import idle_time, response_rate, suspension
from minpro_megatron.fleet.dispatch import Dispatcher, Ticket
from minpro_megatron.fleet.member import Key, Member
from minpro_megatron.fleet.response_rate import RATE_GROUPS
from minpro_megatron.records import ServerAddress
from tests.support.fake_client import FakeClient
from tests.support.rollout_fakes import sequence


def training(number: int) -> Ticket:
    return Ticket(False, number)


def evaluation(number: int) -> Ticket:
    return Ticket(True, number)


class Setting:
    def __init__(self, count: int, max_requests: int = 2) -> None:
        self.members = [
            Member(ServerAddress(index=index, url="http://x", tensor_parallel=1), FakeClient(f"server {index}"))
            for index in range(count)
        ]
        self.current = list(self.members)
        self.dispatcher = Dispatcher(
            lambda: self.current, lambda member: member in self.current, max_requests, slow_factor=3
        )
        self.dispatcher.dispatch()

    async def take(self, count: int, num_requests: int = 1) -> list[int]:
        return [
            (await self.dispatcher.acquire(training(number), num_requests, ())).address.index for number in range(count)
        ]

    def rate(self, index: int, wall_time_s: float, groups: int = RATE_GROUPS) -> None:
        for _ in range(groups):
            self.members[index].succeeded([sequence(0, 1, length=2), sequence(0, 1, length=10)], wall_time_s)


def test_the_least_loaded_server_is_next() -> None:
    async def main() -> None:
        setting = Setting(3)
        assert await setting.take(4) == [0, 1, 2, 0]
        setting.dispatcher.release(setting.members[2], 1)
        assert await setting.take(1) == [2]

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_the_choice_is_that_of_a_search_through_all_servers(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups come and end, servers fail and recover, leave and return, and turn out slow."""
    rng, now = random.Random(seed), 0.0
    monkeypatch.setattr(suspension, "time", SimpleNamespace(monotonic=lambda: now))
    setting = Setting(7, max_requests=6)
    members, dispatcher, held = setting.members, setting.dispatcher, []
    slow: set[Key] = set()

    def best(num_requests: int) -> Member | None:
        free = [one for one in setting.current if not one.suspension.is_active]
        free = [one for one in free if not one.num_requests or one.num_requests + num_requests <= 6]
        return min(free, key=lambda one: (one.key in slow, one.num_requests, one.key), default=None)

    async def main() -> None:
        nonlocal now, slow
        chosen = 0
        for _ in range(600):
            now += rng.random() / 4
            member = rng.choice(members)
            match rng.randrange(8):
                case 0:
                    member.suspension.begin()
                case 1 if member in setting.current:
                    setting.current.remove(member)
                case 2 if member not in setting.current:
                    setting.current.append(member)
                    dispatcher.dispatch(member)
                case 3:
                    setting.rate(member.address.index, rng.choice([1.0, 9.0]))
                    dispatcher.judge_rates()
                    dispatcher.dispatch()
                    measured = {one.key: one.rate.tokens_per_s for one in setting.current}
                    rates = {key: rate for key, rate in measured.items() if rate is not None}
                    middle = statistics.median_high(rates.values()) if rates else 0.0
                    slow = {key for key, rate in rates.items() if rate < middle / 3}
                case 4 | 5 if held:
                    dispatcher.release(*held.pop(rng.randrange(len(held))))
                case _:
                    size = rng.randint(1, 4)
                    expected = best(size)
                    if expected is None:
                        continue
                    found = await dispatcher.acquire(training(0), size, ())
                    assert found is expected
                    held.append((found, size))
                    chosen += 1
        assert chosen > 50

    asyncio.run(main())


def test_room_is_counted_in_requests() -> None:
    """Eight requests a server: one of six leaves room for one of two, and none for one of four."""

    async def main() -> None:
        setting = Setting(2, max_requests=8)
        assert await setting.take(2, num_requests=6) == [0, 1]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(setting.dispatcher.acquire(training(0), 4, ()), 0.01)
        assert await setting.take(2, num_requests=2) == [0, 1]
        assert [member.num_requests for member in setting.members] == [8, 8]
        setting.dispatcher.release(setting.members[1], 6)
        assert await setting.take(1, num_requests=4) == [1]

    asyncio.run(main())


def test_a_group_larger_than_a_server_has_one_to_itself() -> None:
    async def main() -> None:
        setting = Setting(2, max_requests=8)
        assert await setting.take(1, num_requests=2) == [0]
        assert await setting.take(1, num_requests=128) == [1]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(setting.dispatcher.acquire(training(0), 128, ()), 0.01)

    asyncio.run(main())


def test_evaluation_groups_wait_for_all_training_groups() -> None:
    async def main() -> None:
        setting = Setting(1, max_requests=1)
        order: list[Ticket] = []

        async def work(ticket: Ticket) -> None:
            member = await setting.dispatcher.acquire(ticket, 1, ())
            order.append(ticket)
            await asyncio.sleep(0)
            setting.dispatcher.release(member, 1)

        tickets = [evaluation(0), evaluation(1), training(2), evaluation(3), training(4)]
        await asyncio.gather(*(work(ticket) for ticket in tickets))
        # the first one found the server free
        assert order == [evaluation(0), training(2), training(4), evaluation(1), evaluation(3)]

    asyncio.run(main())


def test_the_lowest_ticket_is_served_first_even_if_it_came_last() -> None:
    async def main() -> None:
        setting = Setting(1, max_requests=1)
        order: list[int] = []

        async def work(number: int) -> None:
            member = await setting.dispatcher.acquire(training(number), 1, ())
            order.append(number)
            await asyncio.sleep(0)
            setting.dispatcher.release(member, 1)

        await asyncio.gather(*(work(ticket) for ticket in (5, 7, 6, 1)))
        assert order == [5, 1, 6, 7]

    asyncio.run(main())


def test_a_group_goes_back_to_a_server_it_has_tried_only_if_there_is_no_other() -> None:
    async def main() -> None:
        setting = Setting(2)
        tried = {setting.members[0].key}
        assert [(await setting.dispatcher.acquire(training(0), 1, tried)).address.index for _ in range(4)] == [
            1,
            1,
            0,
            0,
        ]

    asyncio.run(main())


def test_a_server_far_slower_than_the_median_gets_work_last(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        setting = Setting(2)
        setting.rate(0, wall_time_s=3.1)
        setting.rate(1, wall_time_s=1.0, groups=RATE_GROUPS - 1)
        setting.dispatcher.judge_rates()
        assert setting.dispatcher.num_slow == 0  # too few groups to compare
        setting.rate(1, wall_time_s=1.0, groups=1)
        setting.dispatcher.judge_rates()
        assert setting.dispatcher.num_slow == 1
        assert await setting.take(4) == [1, 1, 0, 0]
        assert "server 0: 3.2 tokens/s per response, the median is 10.0 (server.slow_factor = 3)" in caplog.text
        setting.rate(0, wall_time_s=2.0)
        setting.dispatcher.judge_rates()
        assert setting.dispatcher.num_slow == 0

    asyncio.run(main())


def test_a_rate_of_long_ago_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(2)
    setting.rate(0, 10.0)
    assert setting.members[0].rate.tokens_per_s == pytest.approx(1.0)
    monkeypatch.setattr(response_rate, "RATE_LIFETIME_S", 0.0)
    assert setting.members[0].rate.tokens_per_s is None


def test_failures_suspend_a_server_ever_longer_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(suspension, "time", SimpleNamespace(monotonic=lambda: now))
    (member,) = Setting(1).members
    pauses = []
    for _ in range(9):
        pauses.append(member.suspension.begin())
        assert member.suspension.is_active
        now += pauses[-1] / 2
        assert member.suspension.begin() == pytest.approx(pauses[-1] / 2)  # of the same burst: counts once
        now += pauses[-1] / 2
        assert not member.suspension.is_active
    assert pauses == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    member.succeeded([sequence(0, 1)], 1.0)
    assert member.suspension.begin() == 0.5


def test_suspended_servers_get_nothing() -> None:
    async def main() -> None:
        setting = Setting(2, max_requests=1)
        setting.members[0].suspension.begin()
        assert await setting.take(1) == [1]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(setting.dispatcher.acquire(training(1), 1, ()), 0.01)

    asyncio.run(main())


def test_a_waiter_that_is_cancelled_takes_nothing_along() -> None:
    async def main() -> None:
        setting = Setting(1, max_requests=1)
        await setting.take(1)
        waiting = asyncio.create_task(setting.dispatcher.acquire(training(1), 1, ()))
        await asyncio.sleep(0)
        setting.dispatcher.release(setting.members[0], 1)  # it is given the server and cancelled in the same moment
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (setting.members[0].num_groups, setting.members[0].num_requests) == (0, 0)
        assert await setting.take(1) == [0]

    asyncio.run(main())


def test_a_failure_is_raised_where_groups_wait() -> None:
    async def main() -> None:
        setting = Setting(0)
        waiting = [asyncio.create_task(setting.dispatcher.acquire(training(number), 1, ())) for number in range(2)]
        await asyncio.sleep(0)
        assert setting.dispatcher.num_waiting == 2
        setting.dispatcher.fail(RuntimeError("over"))
        for task in waiting:
            with pytest.raises(RuntimeError, match="over"):
                await task
        assert setting.dispatcher.num_waiting == 0

    asyncio.run(main())


def test_idle_time_is_time_without_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(idle_time, "time", SimpleNamespace(monotonic=lambda: now))
    (member,) = Setting(1).members
    now = 3.0
    assert member.idle_time.total_s() == 3
    member.take(1)
    member.take(1)
    now = 10.0
    member.release(1)
    assert member.idle_time.total_s() == 3
    member.release(1)
    now = 12.0
    assert member.idle_time.total_s() == 5
