"""A server while it holds a group of episodes: it gets a request for each turn of each episode."""

import uuid
from collections.abc import Awaitable
from dataclasses import replace

import numpy as np

from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.member import Member
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters


class HeldServer:
    """Samples the turns of one group on `member`, which the group has acquired."""

    def __init__(self, fleet: Fleet, member: Member) -> None:
        self._fleet, self._member = fleet, member
        self._key = uuid.uuid4().hex

    async def sample(
        self, prompt_token_ids: np.ndarray, seed: int, sampling: SamplingParameters, policy_version: int
    ) -> SampledSequence:
        """One continuation. Raises MemberGone and ServerError."""
        await self._fleet.until_current(self._member)
        # the cache may hold the group's earlier turns as older weights computed them
        sampling = replace(sampling, cache_key=f"{self._key} {self._member.held_version}")
        (sequence,) = await self._member.generate(prompt_token_ids, [seed], sampling, policy_version)
        return sequence

    async def idle[Result](self, waiting: Awaitable[Result]) -> Result:
        """The result of `waiting`; meanwhile the server may have another request in place of this episode's."""
        self._fleet.change_load(self._member, -1)
        try:
            return await waiting
        finally:
            self._fleet.change_load(self._member, 1)
