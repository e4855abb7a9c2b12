"""Repeats attempts that fail, with growing pauses, until one succeeds or a deadline has passed."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from minpro_megatron.rewards.judging import GradingFailed

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
MIN_ATTEMPT_S = 0.5  # left for a repeated attempt: one with less would fail for that reason and hide the real one


async def repeated[Result](
    attempt: Callable[[float], Awaitable[Result]],
    deadline_s: float,
    on_failure: Callable[[GradingFailed], object],
    max_attempts: int | None = None,
) -> Result:
    """The result of the first attempt that succeeds. Each is given the seconds that are left, and fails within them.

    `on_failure` is called with each failure. Raises the last GradingFailed, with the number of attempts, once
    `deadline_s` seconds or `max_attempts` attempts have passed. Each pause is twice as long as the one before, up to
    MAX_PAUSE_S, times a random factor from 0.5 to 1, so that groups which failed together do not come back together.
    """
    loop = asyncio.get_running_loop()
    deadline, pause_s, num_attempts = loop.time() + deadline_s, FIRST_PAUSE_S, 0
    while True:
        num_attempts += 1
        try:
            return await attempt(deadline - loop.time())
        except GradingFailed as error:
            failure = error
        on_failure(failure)
        pause_s, wait_s = min(2 * pause_s, MAX_PAUSE_S), pause_s * random.uniform(0.5, 1.0)
        if loop.time() + wait_s + MIN_ATTEMPT_S > deadline:
            limit = f"within reward.deadline_s = {deadline_s:g} s"
        elif num_attempts == max_attempts:
            limit = "as often as a function is called"
        else:
            await asyncio.sleep(wait_s)
            continue
        raise GradingFailed(f"{failure} (attempt {num_attempts}, {limit})", failure.timed_out)
