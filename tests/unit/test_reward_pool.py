"""Graders that hang, die, raise or print: the response gets 0, the next one is graded as if nothing had been."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import msgspec
import psutil
import pytest

from minpro_megatron.rewards.pool import RewardPool, RewardWorkerError
from minpro_megatron.rewards.registry import load_reward
from minpro_megatron.rewards.worker import LENGTH

SPIN = "tests.unit.hostile_rewards:spin"

# A worker with the real protocol whose grader does what the response says. Standard library only: it starts in 20 ms.
WORKER = """
import struct, sys, time, os
def read(n):
    data = sys.stdin.buffer.read(n)
    if len(data) < n: sys.exit(0)
    return data
def write(data):
    sys.stdout.buffer.write(struct.pack("<I", len(data)) + data); sys.stdout.buffer.flush()
write(b"")
while True:
    body = read(struct.unpack("<I", read(4))[0])
    if b"hang" in body: time.sleep(60)
    if b"die" in body: os._exit(9)
    if b"garbage" in body: write(b"\\xc1"); continue
    def judged(reward): write(b"\\x93\\xcb" + struct.pack(">d", reward) + b"\\xc0\\xcb" + bytes(8))
    if b"nan" in body: judged(float("nan")); continue
    if b"raise" in body: write(bytes([0xa5]) + b"Error"); continue
    judged(1.0 if b"right" in body else 0.0)
"""


PATIENCE_S = 0.4  # with a grader that hangs; one that does not answers within it also on a busy machine


def with_pool(use: Callable[[RewardPool], Awaitable[None]], timeout_s: float = 60, num_workers: int = 1) -> RewardPool:
    pool = RewardPool("calculator", num_workers, timeout_s, command=[sys.executable, "-I", "-S", "-c", WORKER])

    async def main() -> None:
        async with pool:
            await use(pool)

    asyncio.run(main())
    return pool


def test_rewards_come_in_order() -> None:
    async def use(pool: RewardPool) -> None:
        assert await pool.grade_all(["right", "wrong", "right"], "1", "s") == [1.0, 0.0, 1.0]
        assert await pool.grade_all([], "1", "s") == []

    pool = with_pool(use)
    assert (pool.num_killed, pool.num_errors) == (0, 0)


@pytest.mark.parametrize("fault", ["hang", "die", "garbage"])
def test_a_killed_grader_costs_one_response(fault: str) -> None:
    async def use(pool: RewardPool) -> None:
        assert await pool.grade_all(["right", fault, "right"], "1", "s") == [1.0, 0.0, 1.0]
        assert await pool.grade_all(["right"], "1", "s") == [1.0]

    pool = with_pool(use, timeout_s=PATIENCE_S if fault == "hang" else 60)
    assert (pool.num_killed, pool.num_errors) == (1, 0)


def test_a_busy_event_loop_is_not_taken_for_a_hanging_grader() -> None:
    async def use(pool: RewardPool) -> None:
        assert await pool.grade_all(["right"], "1", "s") == [1.0]  # the worker runs
        grading = asyncio.create_task(pool.grade_all(["right"], "1", "s"))
        await asyncio.sleep(0)
        time.sleep(1.2 * PATIENCE_S)
        assert await grading == [1.0]

    assert with_pool(use, timeout_s=PATIENCE_S).num_killed == 0


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_a_grader_that_raises_costs_one_response(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    async def use(pool: RewardPool) -> None:
        assert await pool.grade_all(["right", fault, "right"], "1", "s") == [1.0, 0.0, 1.0]

    pool = with_pool(use)
    assert (pool.num_killed, pool.num_errors) == (0, 1)
    assert f"reward 0 for '{fault}'" in caplog.text


def test_one_hanging_grader_does_not_hold_up_the_others() -> None:
    async def use(pool: RewardPool) -> None:
        slow = asyncio.create_task(pool.grade_all(["hang"], "1", "s"))
        await asyncio.sleep(0)
        assert await pool.grade_all(["right"], "1", "s") == [1.0]
        assert not slow.done()
        assert await slow == [0.0]

    assert with_pool(use, timeout_s=0.5, num_workers=2).num_killed == 1


def test_after_a_cancelled_group_the_next_answers_are_its_own() -> None:
    async def use(pool: RewardPool) -> None:
        cancelled = asyncio.create_task(pool.grade_all(["right", "hang"], "1", "s"))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await pool.grade_all(["wrong"], "1", "s") == [0.0]

    with_pool(use)


def test_no_process_is_left() -> None:
    workers: list[psutil.Process] = []

    async def use(pool: RewardPool) -> None:
        await pool.grade_all(["right", "hang", "right"], "1", "s")
        workers.extend(psutil.Process().children())

    with_pool(use, timeout_s=PATIENCE_S)
    assert len(workers) == 1
    assert not workers[0].is_running()


def test_a_worker_that_cannot_start_is_an_error_of_the_installation() -> None:
    async def main() -> None:
        async with RewardPool("calculator", 1, 1.0, command=[sys.executable, "-I", "-S", "-c", "raise SystemExit(3)"]):
            raise AssertionError("started")

    with pytest.raises(RewardWorkerError, match="did not start"):
        asyncio.run(main())


def test_an_unknown_reward_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"collector.reward = 'nonsense'.*known: calculator"):
        RewardPool("nonsense", 1, 1.0)
    with pytest.raises(ValueError, match="known: calculator"):
        load_reward("nonsense")


def test_the_real_worker_grades() -> None:
    async def main() -> None:
        async with RewardPool("calculator", 1, 5.0) as pool:
            assert await pool.grade_all(["24", "25", "024", ""], "24", "s") == [1.0, 0.0, 0.0, 0.0]
            assert await pool.grade_all(["24"], "twenty-four", "s") == [0.0]
            assert pool.num_errors == 1

    asyncio.run(main())


def test_each_source_has_its_own_reward_and_what_was_compared_is_told() -> None:
    async def main() -> None:
        by_source = {"maths": "dapo", "mine": "tests.unit.hostile_rewards:three"}
        async with RewardPool("calculator", 1, 5.0, by_source) as pool:
            assert await pool.grade_all(["24", "Answer: 24"], "24", "anything") == [1.0, 0.0]
            assert await pool.grade_all(["24", "Answer: 24"], "24", "maths") == [-1.0, 1.0]
            assert await pool.grade_all(["24"], "24", "mine") == [3.0]
            (judged,) = await pool.judge_all(["so\nAnswer: $7$"], "24", "maths")
            assert (judged.reward, judged.extracted, judged.problem) == (-1.0, "7", None)
            assert judged.seconds is not None
            assert 0 < judged.seconds < 1

    asyncio.run(main())


def test_a_reward_that_cannot_be_loaded_is_told_before_anything_is_graded() -> None:
    async def main() -> None:
        async with RewardPool("calculator", 1, 5.0, {"mine": "tests.unit.hostile_rewards:missing"}):
            raise AssertionError("started")

    with pytest.raises(ValueError, match=r"'tests.unit.hostile_rewards:missing' cannot be loaded: AttributeError"):
        asyncio.run(main())


@pytest.mark.parametrize("name", ["nonsense", "package.module", ":grade", "a b:c", "a:b.c", "a..b:c", "../x:y"])
def test_a_reward_of_a_source_is_checked_by_its_form_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=r"collector.reward_by_source\['s'\] = .*known: .*import path"):
        RewardPool("calculator", 1, 1.0, {"s": name})


def test_a_worker_whose_collector_was_killed_ends_itself() -> None:
    """It would grade a hostile response for ever, for its input stays open as long as it does not read."""
    command = [sys.executable, "-m", "minpro_megatron.rewards.worker", str(2**32), "0.2", SPIN]
    request = msgspec.msgpack.encode((SPIN, "1", "1"))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        worker.stdin.write(LENGTH.pack(len(request)) + request)
        worker.stdin.flush()
        assert worker.wait(60) == -signal.SIGALRM
