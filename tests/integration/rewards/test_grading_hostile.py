"""Hostile responses under the limits of time and memory of a real worker process."""

import asyncio

from minpro_megatron.rewards.pool import RewardPool

SPIN, HOG = "tests.support.hostile_rewards:spin", "tests.support.hostile_rewards:hog"


async def rewards_of(pool: RewardPool, reward: str, texts: list[str]) -> list[float | None]:
    return [judged.reward for judged in await pool.judge_all(reward, texts, "1")]


def test_what_exceeds_the_limits_costs_its_response_only() -> None:
    async def main() -> None:
        async with RewardPool(["calculator", SPIN, HOG], 1, 0.3) as pool:
            assert await rewards_of(pool, "calculator", ["1", "2"]) == [1.0, 0.0]
            (judged,) = await pool.judge_all(SPIN, ["1"], "1")
            assert judged.reward is None
            assert judged.problem == "grader exceeded reward.timeout_s = 0.3 s of processor time"
            assert await rewards_of(pool, "calculator", ["1"]) == [1.0]
            assert await rewards_of(pool, HOG, ["small", "large", "small"]) == [1.0, None, 1.0]
            assert (pool.num_timed_out, pool.num_failed) == (1, 1)

    asyncio.run(main())
