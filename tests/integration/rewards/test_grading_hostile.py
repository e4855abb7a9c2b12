"""Hostile responses under the limits of time and memory of a real worker process."""

import asyncio

from minpro_megatron.rewards.pool import RewardPool


async def rewards_of(pool: RewardPool, texts: list[str], source: str) -> list[float | None]:
    return [judged.reward for judged in await pool.judge_all(texts, "1", source)]


def test_what_exceeds_the_limits_costs_its_response_only() -> None:
    async def main() -> None:
        rewards = {"spin": "tests.support.hostile_rewards:spin", "hog": "tests.support.hostile_rewards:hog"}
        async with RewardPool("calculator", 1, 0.3, by_source=rewards) as pool:
            assert await rewards_of(pool, ["1", "2"], "plain") == [1.0, 0.0]
            (judged,) = await pool.judge_all(["1"], "1", "spin")
            assert judged.reward is None
            assert judged.problem == "grader exceeded reward.timeout_s = 0.3 s of processor time"
            assert await rewards_of(pool, ["1"], "plain") == [1.0]
            assert await rewards_of(pool, ["small", "large", "small"], "hog") == [1.0, None, 1.0]
            assert (pool.num_timed_out, pool.num_failed) == (1, 1)

    asyncio.run(main())
