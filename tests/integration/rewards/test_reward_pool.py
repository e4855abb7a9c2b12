"""Graders that hang, die, raise or print: their response has no reward, and the next one is graded as ever."""

import asyncio
import math
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np
import psutil
import pytest

from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.pipe_messages import write_message
from minpro_megatron.records import Prompt
from minpro_megatron.rewards import pool as pool_module
from minpro_megatron.rewards.forms import Grade
from minpro_megatron.rewards.graders import Graders, SampledText
from minpro_megatron.rewards.judging import Judged, Judgement, judge
from minpro_megatron.rewards.pool import RewardPool, RewardWorkerError
from minpro_megatron.rewards.registry import load_reward
from minpro_megatron.rewards.worker import Request

SPIN, SLEEP = "tests.support.hostile_rewards:spin", "tests.support.hostile_rewards:sleep"

# A worker with the real protocol whose grader does what the response says; "once" for the first process only, of which
# FOLDER tells it. Standard library only: it starts in 20 ms.
WORKER = """
import struct, sys, time, os, signal
folder = sys.argv[1]
count = len(os.listdir(folder))
open(f"{folder}/{os.getpid()}", "w").close()
def read(n):
    data = sys.stdin.buffer.read(n)
    if len(data) < n: sys.exit(0)
    return data
def write(data):
    sys.stdout.buffer.write(struct.pack("<Q", len(data)) + data); sys.stdout.buffer.flush()
def judged(reward): write(b"\\x93\\xcb" + struct.pack(">d", reward) + b"\\xc0\\xcb" + bytes(8))
write(b"\\x80")
while True:
    body = read(struct.unpack("<Q", read(8))[0])
    if b"once" in body and count: judged(1.0); continue
    if b"spin" in body: os.kill(os.getpid(), signal.SIGPROF)
    if b"hang" in body: time.sleep(60)
    if b"die" in body: os._exit(9)
    if b"garbage" in body: write(b"\\xc1"); continue
    if b"raise" in body: write(bytes([0xa5]) + b"Error"); continue
    judged(1.0 if b"right" in body else 0.0)
"""


PATIENCE_S = 0.4  # with a grader that hangs; one that does not answers within it also on a busy machine


def with_pool(use: Callable[[RewardPool], Awaitable[None]], timeout_s: float = 60, num_workers: int = 1) -> RewardPool:
    """`timeout_s` is of wall time: the grader above knows no other."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-S", "-c", WORKER, folder]
        pool = RewardPool(["calculator"], num_workers, timeout_s, command=command, wall_factor=1)

        async def main() -> None:
            async with pool:
                await use(pool)

        asyncio.run(main())
    return pool


async def graded(pool: RewardPool, *texts: str) -> list[float | None]:
    return [judged.reward for judged in await pool.judge_all("calculator", texts, "1")]


def test_rewards_come_in_order() -> None:
    async def use(pool: RewardPool) -> None:
        assert await graded(pool, "right", "wrong", "right") == [1.0, 0.0, 1.0]
        assert await graded(pool) == []

    pool = with_pool(use)
    assert pool.metrics() == {"reward/grader_failed": 0, "reward/grader_timed_out": 0}


@pytest.mark.parametrize(
    ("fault", "failed", "timed_out"),
    [("hang", 0, 1), ("spin", 0, 1), ("die", 1, 0), ("garbage", 1, 0), ("raise", 1, 0)],
)
def test_a_grade_that_fails_twice_is_no_reward(
    fault: str, failed: int, timed_out: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(pool: RewardPool) -> None:
        assert await graded(pool, "right", fault, "right") == [1.0, None, 1.0]
        assert await graded(pool, "right") == [1.0]

    pool = with_pool(use, timeout_s=PATIENCE_S if fault == "hang" else 60)
    assert (pool.num_failed, pool.num_timed_out) == (failed, timed_out)
    assert f"no reward for '{fault}' against '1': grader " in caplog.text


@pytest.mark.parametrize("fault", ["hang", "spin", "die", "garbage", "raise"])
def test_a_grade_that_fails_once_is_tried_again_in_a_new_process(fault: str) -> None:
    async def use(pool: RewardPool) -> None:
        assert await graded(pool, "right", f"{fault} once", "wrong") == [1.0, 1.0, 0.0]

    pool = with_pool(use, timeout_s=PATIENCE_S if fault == "hang" else 60)
    assert (pool.num_failed, pool.num_timed_out) == (0, 0)


def test_a_group_that_is_of_no_use_any_more_is_not_graded_further() -> None:
    async def use(pool: RewardPool) -> None:
        judged = await pool.judge_all("calculator", ["right", "raise", "die", "right"], "1", stop_at_failure=True)
        assert [(one.reward, one.problem) for one in judged] == [(1.0, None), (None, "grader failed: Error")]
        assert await graded(pool, "wrong") == [0.0]

    assert with_pool(use).num_failed == 1


def test_a_broken_grader_is_not_started_again_for_every_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_RETRIES_IN_A_ROW", 2)

    async def use(pool: RewardPool) -> None:
        assert await graded(pool, *["raise"] * 6) == [None] * 6
        assert await graded(pool, "right", "raise once") == [1.0, 1.0]  # it grades again, so trying again is worth it

    assert with_pool(use).num_failed == 6


def test_the_first_failures_are_logged_and_later_ones_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def use(pool: RewardPool) -> None:
        await graded(pool, *["raise"] * 40)

    with_pool(use)
    said = [record.getMessage().split(":")[0] for record in caplog.records]
    assert said[:5] == ["no reward for 'raise' against '1'"] * 5
    assert said[5:] == [f"no reward for {count} responses since the start" for count in (8, 16, 32)]


def test_a_busy_event_loop_is_not_taken_for_a_hanging_grader() -> None:
    async def use(pool: RewardPool) -> None:
        assert await graded(pool, "right") == [1.0]  # the worker runs
        grading = asyncio.create_task(graded(pool, "right"))
        await asyncio.sleep(0)
        time.sleep(1.2 * PATIENCE_S)
        assert await grading == [1.0]

    assert with_pool(use, timeout_s=PATIENCE_S).num_timed_out == 0


def test_one_hanging_grader_does_not_hold_up_the_others() -> None:
    async def use(pool: RewardPool) -> None:
        slow = asyncio.create_task(graded(pool, "hang"))
        await asyncio.sleep(0)
        assert await graded(pool, "right") == [1.0]
        assert not slow.done()
        assert await slow == [None]

    assert with_pool(use, timeout_s=PATIENCE_S, num_workers=2).num_timed_out == 1


def test_after_a_cancelled_group_the_next_answers_are_its_own() -> None:
    async def use(pool: RewardPool) -> None:
        cancelled = asyncio.create_task(graded(pool, "right", "hang"))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await graded(pool, "wrong") == [0.0]

    with_pool(use)


def test_no_process_is_left() -> None:
    workers: list[psutil.Process] = []
    others = psutil.Process().children()  # of earlier tests of this process

    async def use(pool: RewardPool) -> None:
        await graded(pool, "right", "hang", "right")
        workers.extend(child for child in psutil.Process().children() if child not in others)

    with_pool(use, timeout_s=PATIENCE_S)
    assert len(workers) == 1
    assert not workers[0].is_running()


def test_a_worker_that_cannot_start_is_an_error_of_the_installation() -> None:
    async def main() -> None:
        async with RewardPool(
            ["calculator"], 1, 1.0, command=[sys.executable, "-I", "-S", "-c", "raise SystemExit(3)"]
        ):
            raise AssertionError("started")

    with pytest.raises(RewardWorkerError, match="did not start"):
        asyncio.run(main())


def test_an_unknown_reward_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"reward.function = 'nonsense'.*known: calculator"):
        Graders(RewardConfig(function="nonsense"))
    with pytest.raises(ValueError, match="known: calculator"):
        load_reward("nonsense")


def test_the_real_worker_grades() -> None:
    async def main() -> None:
        async with RewardPool(["calculator"], 1, 5.0) as pool:
            judged = await pool.judge_all("calculator", ["24", "25", "024", ""], "24")
            assert [one.reward for one in judged] == [1.0, 0.0, 0.0, 0.0]
            (judged,) = await pool.judge_all("calculator", ["24"], "twenty-four")
            assert judged.reward is None
            assert "ValueError: answer: 'twenty-four' is not an integer" in (judged.problem or "")
            assert pool.num_failed == 1

    asyncio.run(main())


def test_each_source_has_its_own_reward_and_the_compared_part_is_reported() -> None:
    async def main() -> None:
        by_source = {"maths": "dapo", "mine": "tests.support.hostile_rewards:three"}

        async def judged_of(source: str, *texts: str) -> list[Judged]:
            responses = [SampledText(text, np.zeros(0, np.int32), "stop") for text in texts]
            return await graders.judge(Prompt(id="1", source=source, text="", answer="24"), responses)

        async with Graders(RewardConfig(function="calculator", by_source=by_source, workers=1)) as graders:
            rewards = {"anything": [1.0, 0.0], "maths": [-1.0, 1.0], "mine": [3.0, 3.0]}
            for source, expected in rewards.items():
                assert [j.reward for j in await judged_of(source, "24", "Answer: 24")] == expected
            (judged,) = await judged_of("maths", "so\nAnswer: $7$")
            assert (judged.reward, judged.extracted, judged.problem) == (-1.0, "7", None)
            assert judged.seconds is not None
            assert 0 < judged.seconds < 1

    asyncio.run(main())


def test_a_reward_that_cannot_be_loaded_is_reported_before_anything_is_graded() -> None:
    async def main() -> None:
        async with RewardPool(["calculator", "tests.support.hostile_rewards:missing"], 1, 5.0):
            raise AssertionError("started")

    with pytest.raises(ValueError, match=r"hostile_rewards:missing: it cannot be loaded: AttributeError"):
        asyncio.run(main())


@pytest.mark.parametrize("name", ["nonsense", "package.module", ":grade", "a b:c", "a:b.c", "a..b:c", "../x:y"])
def test_a_reward_of_a_source_is_checked_by_its_form_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=r"reward.by_source\['s'\] = .*known: .*import path"):
        Graders(RewardConfig(by_source={"s": name}))


def test_a_worker_whose_collector_was_killed_ends_itself() -> None:
    """It would grade a hostile response for ever, for its input stays open as long as it does not read."""
    assert exit_status(SPIN, cpu_s=0.2, wall_s=60) == -signal.SIGPROF
    assert exit_status(SLEEP, cpu_s=60, wall_s=0.2) == -signal.SIGALRM  # it sleeps for a second


def exit_status(reward: str, cpu_s: float, wall_s: float) -> int:
    """Of a real worker with these limits that grades one response and whose input stays open."""
    command = [sys.executable, "-m", "minpro_megatron.rewards.worker", str(2**32), str(cpu_s), str(wall_s), reward]
    request = msgspec.msgpack.encode(Request(reward, "1", "1"))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        write_message(cast(BinaryIO, worker.stdin), request)
        return worker.wait(60)


def test_waiting_costs_no_processor_time() -> None:
    """A grader that waits is given ten times as long: on a busy machine every grader waits for its turn."""

    async def main() -> None:
        async with RewardPool([SLEEP], 1, 0.1) as pool:
            (judged,) = await pool.judge_all(SLEEP, ["0.3"], "1")
            assert judged.reward == 1.0
            assert (judged.seconds or 0) > 0.3

    asyncio.run(main())


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (math.nan, "ValueError: the grader returned nan, which is not a finite number"),
        (-math.inf, "ValueError: the grader returned -inf, which is not a finite number"),
        (Grade(math.inf, "4"), "ValueError: the grader returned inf, which is not a finite number"),
        (None, "TypeError: the grader returned 'None' of type NoneType instead of a number"),
        ("1.0", "TypeError: the grader returned '1.0' of type str instead of a number"),
        ({"score": 1.0}, "TypeError: the grader returned \"{'score': 1.0}\" of type dict instead of a number"),
    ],
)
def test_what_is_no_finite_number_is_no_reward(value: Any, problem: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        judge(lambda text, answer: value, "text", "answer")
    assert f"{type(error.value).__name__}: {error.value}" == problem


@pytest.mark.parametrize("value", [1, True, 1.0, np.float32(1), np.int64(1), Grade(1, "4")])
def test_any_kind_of_number_is_a_reward(value: Any) -> None:
    judged = judge(lambda text, answer: value, "text", "answer")
    assert isinstance(judged, Judgement)
    assert (judged.reward, type(judged.reward)) == (1.0, float)
