"""Groups through the servers: bounded concurrency, one group on one server, failures moved and repeated."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from minpro_megatron.records import CollectedGroup, IssuedGroup, Response
from minpro_megatron.rewards.pool import RewardPool
from minpro_megatron.serving.client import (
    InvalidAnswer,
    SampledSequence,
    SamplingParameters,
    ServerUnavailable,
)

log = logging.getLogger(__name__)

# Times a group is tried, on another server each time where there is one. The client itself repeats a
# request over dropped connections and 5xx, so this many failures mean a fault that will not pass.
MAX_GROUP_ATTEMPTS = 3


class Generator(Protocol):
    """What a server's client offers; `minpro_megatron.serving.client.ServerClient` is one."""

    name: str

    async def generate(
        self,
        prompt_token_ids: np.ndarray,
        seeds: Sequence[int],
        sampling: SamplingParameters,
        policy_version: int,
    ) -> list[SampledSequence]: ...


class ResponseDecoder(Protocol):
    def response_text(self, token_ids: np.ndarray) -> str: ...


class GenerationError(RuntimeError):
    """A group could not be sampled on any server, also after repeating it."""


class GroupCollector:
    """Samples and rewards groups. At most `max_groups_per_server` groups are under way on a server.

    Groups start in the order in which `collect` is called: earlier batches are not held up by later ones.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        rewards: RewardPool,
        tokenizer: ResponseDecoder,
        max_groups_per_server: int,
    ) -> None:
        self._generators = list(generators)
        self._rewards = rewards
        self._tokenizer = tokenizer
        self._in_flight = [0] * len(self._generators)
        # One gate for all servers: asyncio's semaphore serves waiters first come, first served.
        self._gate = asyncio.Semaphore(max_groups_per_server * len(self._generators))

    async def collect(self, issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        """The group, sampled and rewarded. Raises GenerationError, or a ServerError that cannot be mended."""
        async with self._gate:
            sequences = await self._sample(issued, sampling)
        texts = [self._tokenizer.response_text(sequence.token_ids) for sequence in sequences]
        rewards = await self._rewards.grade_all(texts, issued.prompt.answer)
        responses = [
            Response(
                token_ids=sequence.token_ids,
                rollout_log_probs=sequence.log_probs,
                policy_versions=sequence.policy_versions,
                finish_reason=sequence.finish_reason,
                reward=reward,
            )
            for sequence, reward in zip(sequences, rewards, strict=True)
        ]
        return CollectedGroup(issued=issued, responses=responses)

    async def _sample(self, issued: IssuedGroup, sampling: SamplingParameters) -> list[SampledSequence]:
        failures: list[str] = []
        tried: set[int] = set()
        while len(failures) < MAX_GROUP_ATTEMPTS:
            server = self._least_loaded(tried)
            tried.add(server)
            self._in_flight[server] += 1
            try:
                return await self._generators[server].generate(
                    issued.prompt_token_ids, issued.sampling_seeds, sampling, issued.policy_version
                )
            except (ServerUnavailable, InvalidAnswer) as error:
                failures.append(str(error))
                log.warning("group %d: attempt %d failed: %s", issued.group_id, len(failures), error)
            finally:
                self._in_flight[server] -= 1
        raise GenerationError(
            f"group {issued.group_id} (prompt {issued.prompt.id!r}): {MAX_GROUP_ATTEMPTS} attempts failed; "
            f"the last one: {failures[-1]}"
        )

    def _least_loaded(self, tried: set[int]) -> int:
        untried = set(range(len(self._generators))) - tried
        return min(untried or range(len(self._generators)), key=lambda server: (self._in_flight[server], server))
