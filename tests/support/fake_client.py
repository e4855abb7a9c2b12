"""A server's client that answers without a server."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters
from tests.support.rollout_fakes import sequence


class FakeClient:
    """Generates after `steps` turns of the event loop."""

    def __init__(self, name: str, steps: int = 1, routes: np.ndarray | None = None) -> None:
        self.name, self.steps, self.routes = name, steps, routes
        self.groups: list[tuple[int, ...]] = []
        self.in_flight = self.most_in_flight = 0

    async def __aenter__(self) -> "FakeClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def policy_version(self, timeout_s: float) -> int:
        return 0

    async def generates(self, timeout_s: float) -> bool:
        return True

    async def generate(
        self,
        prompt_token_ids: np.ndarray,
        seeds: Sequence[int],
        sampling: SamplingParameters,
        policy_version: int,
        before_continuing: Callable[[], Awaitable[object]],
    ) -> list[SampledSequence]:
        self.groups.append(tuple(seeds))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for _ in range(self.steps):
            await asyncio.sleep(0)
        self.in_flight -= 1
        made = [sequence(policy_version, seed) for seed in seeds]
        return [
            SampledSequence(one.token_ids, one.log_probs, one.policy_versions, one.finish_reason, self.routes)
            for one in made
        ]
