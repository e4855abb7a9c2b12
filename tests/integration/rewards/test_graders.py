"""The graders of a run: functions of each form and services, each for its sources, and what a failure becomes."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.errors import UserError
from minpro_megatron.records import Prompt
from minpro_megatron.rewards import repeating
from minpro_megatron.rewards.async_pool import AsyncPool
from minpro_megatron.rewards.graders import Graders, SampledText, group_to_grade
from minpro_megatron.rewards.judging import GradingFailed, Judged
from tests.support.reward_service import FAULTS, RewardService

LENGTHS, HOSTILE, PATIENT = (f"tests.support.async_rewards:{name}" for name in ("lengths", "hostile", "patient"))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeating, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(repeating, "MAX_PAUSE_S", 0.05)


def prompt(number: int = 0, answer: str = "24", **fields: Any) -> Prompt:
    return Prompt(id=f"p{number}", source=fields.pop("source", "s"), text="20+4=", answer=answer, **fields)


def sampled(*texts: str, finish_reason: str = "stop") -> list[SampledText]:
    return [SampledText(text, np.arange(len(text), dtype=np.int32), finish_reason) for text in texts]


def judged(
    settings: RewardConfig, groups: Sequence[tuple[Prompt, list[SampledText]]]
) -> tuple[list[list[Judged]], dict[str, float]]:
    """The groups, judged at the same time, and the metrics."""

    async def main() -> tuple[list[list[Judged]], dict[str, float]]:
        async with Graders(settings) as graders:
            return await asyncio.gather(*(graders.judge(*group) for group in groups)), graders.metrics()

    return asyncio.run(main())


def rewards_of(judgements: Sequence[Judged]) -> list[float | None]:
    return [one.reward for one in judgements]


def http(service: RewardService, *more: str, **settings: Any) -> RewardConfig:
    return RewardConfig(function="http", urls=[service.url, *more], **settings)


def test_a_group_reward_sees_metadata_tokens_and_the_reason_of_the_end() -> None:
    groups = [
        (prompt(metadata={"bonus": 10}), sampled("abc", "")),
        (prompt(), sampled("abcd", finish_reason="length")),
    ]
    found, _ = judged(RewardConfig(function=LENGTHS), groups)
    assert [rewards_of(group) for group in found] == [[13.0, 10.0], [4.5]]


@pytest.mark.parametrize(
    ("fault", "told", "timed_out"),
    [
        ("raise", "grader failed: RuntimeError: no grade", 0),
        ("die", "grader died with exit status 9", 0),
        ("spin", "grader exceeded reward.timeout_s = 0.2 s", 2),
    ],
)
def test_a_group_reward_that_fails_gives_no_reward_to_any_response(fault: str, told: str, timed_out: int) -> None:
    settings = RewardConfig(function=HOSTILE, timeout_s=0.2 if fault == "spin" else 60)
    found, metrics = judged(settings, [(prompt(), sampled("fine", fault)), (prompt(), sampled("fine"))])
    assert rewards_of(found[0]) == [None, None]
    assert told in (found[0][0].problem or "")
    assert rewards_of(found[1]) == [1.0]
    assert metrics["reward/grader_timed_out"] == timed_out
    assert metrics["reward/grader_failed"] == 2 - timed_out


def test_async_groups_wait_at_the_same_time() -> None:
    start = time.monotonic()
    found, metrics = judged(RewardConfig(function=PATIENT), [(prompt(n), sampled("1.5", "x")) for n in range(20)])
    assert [rewards_of(group) for group in found] == [[1.0, 1.0]] * 20
    assert found[0][0].extracted == "seen"
    assert time.monotonic() - start < 20
    assert metrics["reward/attempts_failed"] == 0


def test_an_async_reward_is_called_again_after_a_failure(tmp_path: Path) -> None:
    groups = [(prompt(0), sampled("fail twice", "x")), (prompt(1, answer=str(tmp_path / "died")), sampled("die once"))]
    found, metrics = judged(RewardConfig(function=PATIENT), groups)
    assert [rewards_of(group) for group in found] == [[1.0, 1.0], [1.0]]
    assert metrics["reward/attempts_failed"] >= 3
    assert metrics["reward/grader_failed"] == 0


def test_an_async_reward_that_always_fails_is_given_up() -> None:
    settings = RewardConfig(function=PATIENT, attempt_timeout_s=0.3)
    found, metrics = judged(
        settings, [(prompt(0), sampled("raise")), (prompt(1), sampled("60")), (prompt(2), sampled("0"))]
    )
    assert [rewards_of(group) for group in found] == [[None], [None], [1.0]]
    assert found[0][0].problem == "grader failed: RuntimeError: no grade (attempt 5, as often as a function is called)"
    assert "no result within reward.attempt_timeout_s = 0.3 s" in (found[1][0].problem or "")
    assert (metrics["reward/grader_failed"], metrics["reward/grader_timed_out"]) == (1, 1)


def test_each_source_has_its_grader() -> None:
    with RewardService().running() as service:
        by_source = {"lengths": LENGTHS, "patient": PATIENT, "service": "http"}
        settings = RewardConfig(function="calculator", by_source=by_source, urls=[service.url])
        texts = {"patient": "0"}  # seconds that it waits
        groups = [(prompt(source=source), sampled(texts.get(source, "24"), "7")) for source in ("s", *by_source)]
        found, _ = judged(settings, groups)
    assert [rewards_of(group) for group in found] == [[1.0, 0.0], [2.0, 1.0], [1.0, 1.0], [1.0, 0.0]]


def test_a_service_receives_the_row_and_the_responses() -> None:
    with RewardService().running() as service:
        asked = prompt(prefix="2", metadata={"tests": ["a", 1]})
        found, _ = judged(http(service), [(asked, sampled("24", "250", finish_reason="length"))])
    assert rewards_of(found[0]) == [1.0, 0.0]
    assert service.received == [
        {
            "id": "p0", "source": "s", "prompt": "20+4=", "answer": "24", "prefix": "2",
            "metadata": {"tests": ["a", 1]},
            "responses": [
                {"text": "24", "num_tokens": 2, "finish_reason": "length"},
                {"text": "250", "num_tokens": 3, "finish_reason": "length"},
            ],
        }
    ]  # fmt: skip


def test_with_faults_every_group_gets_the_rewards_of_a_faultless_service() -> None:
    groups = [(prompt(number), sampled("24", str(number), "")) for number in range(120)]
    with RewardService(share=0.4).running() as service:
        found, metrics = judged(http(service, attempt_timeout_s=1.0, concurrency=16), groups)
    assert service.failed.keys() == FAULTS.keys()
    assert [rewards_of(group) for group in found] == [[1.0, float(number == 24), 0.0] for number in range(120)]
    assert metrics["reward/attempts_failed"] >= service.failed.total() - service.failed["delayed"]
    assert metrics["reward/grader_failed"] == metrics["reward/grader_timed_out"] == 0
    assert service.most_under_way <= 16


TOLD = {
    "late": "no answer within 0.",
    "dropped": "ServerDisconnectedError",
    "half": "ClientPayloadError",
    "internal_error": "status 500: 'the judge is out of memory'",
    "not_a_number": "the answer is invalid: JSON is malformed",
    "infinite": "the answer is invalid: ",
    "garbage": "the answer is invalid: ",
    "nested": "the answer is invalid: ",
    "too_few": "the grader returned 1 rewards for 2 responses",
    "texts": "the answer is invalid: Expected `float`, got `str`",
}


@pytest.mark.parametrize(("fault", "told"), TOLD.items())
def test_a_service_that_always_fails_gives_no_reward_and_is_named(fault: str, told: str) -> None:
    # a short attempt only where it has to end by its time: on a busy machine any answer may take 0.3 s
    attempt_s = 0.3 if fault == "late" else 30.0
    with RewardService(share=1.0, faults=[fault]).running() as service:
        settings = http(service, attempt_timeout_s=attempt_s, deadline_s=0.8)
        found, metrics = judged(settings, [(prompt(), sampled("24", "25"))])
    assert rewards_of(found[0]) == [None, None]
    problem = found[0][0].problem or ""
    assert problem.startswith(f"{service.url}: {told}")
    assert "within reward.deadline_s = 0.8 s)" in problem
    assert metrics["reward/grader_failed"] + metrics["reward/grader_timed_out"] == 2
    assert metrics["reward/attempts_failed"] >= 1


def test_a_service_that_is_away_is_replaced_by_another() -> None:
    with RewardService().running() as service:
        groups = [(prompt(number), sampled("24")) for number in range(10)]
        found, metrics = judged(http(service, "http://127.0.0.1:9/grade"), groups)
    assert [rewards_of(group) for group in found] == [[1.0]] * 10
    assert metrics["reward/attempts_failed"] > 0


def test_groups_spread_over_the_services() -> None:
    with RewardService(share=1.0, faults=["delayed"]).running() as one, RewardService().running() as other:
        judged(http(one, other.url), [(prompt(number), sampled("24")) for number in range(10)])
        assert len(one.received) + len(other.received) == 10
        assert one.received
        assert other.received


def test_a_service_that_comes_back_before_the_deadline_has_cost_only_time() -> None:
    service = RewardService()
    with service.running():
        port = int(service.url.split(":")[2].split("/")[0])

    async def main() -> tuple[list[Judged], dict[str, float]]:
        async with Graders(http(service)) as graders:
            asking = asyncio.create_task(graders.judge(prompt(), sampled("24")))
            while not graders.metrics()["reward/attempts_failed"]:
                await asyncio.sleep(0.01)
            with service.running(port):
                return await asking, graders.metrics()

    found, metrics = asyncio.run(main())
    assert rewards_of(found) == [1.0]
    assert metrics["reward/grader_failed"] == 0


def test_a_function_of_no_form_is_refused_before_anything_is_graded() -> None:
    name = "tests.support.async_rewards:three_arguments"
    with pytest.raises(
        UserError, match=r"three_arguments: its arguments are \(group.*\); a reward is a function \(resp"
    ):
        judged(RewardConfig(function=name), [])


def test_a_function_that_does_not_await_ends_its_process_and_the_next_group_has_a_new_one() -> None:
    """Otherwise one call would stop the grading of all groups for ever."""
    group = group_to_grade(prompt(), sampled("block"))

    async def main() -> None:
        async with AsyncPool([PATIENT], attempt_timeout_s=60, blocked_s=2.0) as pool:
            with pytest.raises(GradingFailed, match="the grader did not await anything for too long"):
                await pool.judge(PATIENT, group, 60)
            assert (await pool.judge(PATIENT, group_to_grade(prompt(), sampled("0")), 60))[0].reward == 1.0

    asyncio.run(main())
