"""Episodes: responses of several turns, which the policy samples and an environment answers, as token ids.

Each turn is a request of its own, to the same server for all turns of a group, which still has their tokens in its
prefix cache. If the server fails, the group continues on another one, after the turns that are complete.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import numpy as np

from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.environments.environment import (
    Answer,
    Environment,
    EpisodeTurn,
    PastTurn,
    checked_answer,
    recordable,
)
from minpro_megatron.environments.framing import Framing, checked_ids
from minpro_megatron.records import NO_LOG_PROB, NOT_SAMPLED, IssuedGroup, Turn
from minpro_megatron.serving.answers import SampledSequence, joined
from minpro_megatron.serving.client import SamplingParameters

log = logging.getLogger(__name__)

GIVEN = "given"  # finish reason of a part that the environment gave


class TextDecoder(Protocol):
    def response_texts(self, responses: Sequence[np.ndarray]) -> list[str]: ...


class Server(Protocol):
    """A server of the fleet that holds a group (fleet.fleet.HeldServer)."""

    async def sample(
        self, prompt_token_ids: np.ndarray, seed: int, sampling: SamplingParameters, policy_version: int
    ) -> SampledSequence:
        """One continuation. Raises MemberGone and ServerError."""
        ...

    async def idle[Result](self, waiting: Awaitable[Result]) -> Result:
        """The result of `waiting`; the server may meanwhile have another request in place of the episode's."""
        ...


@dataclass(frozen=True)
class EpisodeRules:
    """What all episodes of a process have in common."""

    environment: Environment
    framing: Framing
    decoder: TextDecoder
    vocabulary_size: int
    max_turns: int
    timeout_s: float | None  # of an answer; None: the environment has limits of its own

    def begin(self, issued: IssuedGroup, sampling: SamplingParameters) -> "GroupEpisodes":
        return GroupEpisodes(self, issued, sampling)


class GroupEpisodes:
    """The episodes of a group, one for each of its seeds."""

    def __init__(self, rules: EpisodeRules, issued: IssuedGroup, sampling: SamplingParameters) -> None:
        self._episodes = [_Episode(rules, issued, seed, sampling) for seed in issued.sampling_seeds]

    async def run(self, server: Server) -> list[SampledSequence]:
        """All episodes from where they are to their end. Raises the first error of the server; the episodes then keep
        their complete turns, and `run` continues them on another server."""
        all_over, num_left = asyncio.Event(), len(self._episodes)

        async def run(episode: _Episode) -> SampledSequence:
            nonlocal num_left
            sequence = await episode.run(server)
            num_left -= 1
            if num_left:  # until the group is over, its server may have another request in place of this episode
                await server.idle(all_over.wait())
            all_over.set()
            return sequence

        tasks = [asyncio.create_task(run(one)) for one in self._episodes]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Episode:
    """One episode: the parts so far, alternately sampled and given."""

    def __init__(self, rules: EpisodeRules, issued: IssuedGroup, seed: int, sampling: SamplingParameters) -> None:
        self._rules, self._issued, self._seed, self._sampling = rules, issued, seed, sampling
        self._parts: list[SampledSequence] = []
        self._turns: list[Turn] = []
        self._past: list[PastTurn] = []
        self._finish_reason = ""  # empty until the episode has ended
        self._failure = ""  # of the environment

    async def run(self, server: Server) -> SampledSequence:
        while not self._finish_reason:
            if len(self._parts) > 2 * len(self._turns):  # the last part is sampled, and has no answer yet
                await self._answered(server)
            else:
                self._parts.append(await self._sampled(server))
        return self._joined()

    @property
    def _num_tokens(self) -> int:
        return sum(len(part.token_ids) for part in self._parts)

    async def _sampled(self, server: Server) -> SampledSequence:
        """The policy's next turn. The first one is sampled like a response without an environment."""
        number, version = len(self._turns), self._issued.policy_version
        seed = derive_seed(self._seed, "turn", number) if number else self._seed
        if self._parts:
            version = int(self._parts[-2].policy_versions[-1])
        tokens = np.concatenate([self._issued.prompt_token_ids, *(part.token_ids for part in self._parts)])
        left = self._sampling.max_response_tokens - self._num_tokens
        return await server.sample(tokens, seed, replace(self._sampling, max_response_tokens=left), version)

    async def _answered(self, server: Server) -> None:
        """Asks the environment for its answer to the last part, or ends the episode."""
        sampled = self._parts[-1]
        turn = Turn(sampled_tokens=len(sampled.token_ids))
        if sampled.finish_reason == "length" or len(self._turns) + 1 == self._rules.max_turns:
            return self._end(turn, sampled.finish_reason)
        (text,) = await asyncio.to_thread(self._rules.decoder.response_texts, [sampled.token_ids])
        began = time.monotonic()
        try:
            answer = checked_answer(await server.idle(self._ask(text)))
            given = None if answer is None else await asyncio.to_thread(self._given_ids, answer)
        except Exception as error:  # of the environment: any
            self._failure = _described(error, self._rules.timeout_s)
            trace = recordable("".join(traceback.format_exception(error)))  # a log file cannot hold lone surrogates
            log.warning("group %d: %s\n%s", self._issued.group_id, self._failure, trace)
            return self._end(_with(turn, problem=self._failure, seconds=time.monotonic() - began), "stop")
        seconds = time.monotonic() - began
        if answer is None or given is None:
            return self._end(_with(turn, seconds=seconds), "stop")
        turn = _with(turn, tool_calls=answer.tool_calls, seconds=seconds, problem=answer.problem)
        if self._num_tokens + len(given) >= self._sampling.max_response_tokens:  # no token would be left for the policy
            return self._end(turn, "length")
        self._parts.append(_given_part(given))
        self._turns.append(_with(turn, given_tokens=len(given)))
        self._past.append(PastTurn(text, answer.text))

    async def _ask(self, text: str) -> Answer | None:
        issued = self._issued
        turn = EpisodeTurn(issued.prompt, issued.group_id, self._seed, text, tuple(self._past), issued.is_evaluation)
        async with asyncio.timeout(self._rules.timeout_s):
            return await self._rules.environment.answer(turn)

    def _given_ids(self, answer: Answer) -> np.ndarray:
        if answer.token_ids is not None:
            return checked_ids(answer.token_ids, self._rules.vocabulary_size)
        return self._rules.framing.framed(answer.text)

    def _end(self, last: Turn, finish_reason: str) -> None:
        self._turns.append(last)
        self._finish_reason = finish_reason

    def _joined(self) -> SampledSequence:
        whole = joined(self._parts)
        mask = None
        if len(self._parts) > 1:
            mask = np.concatenate(
                [np.full(len(part.token_ids), part.finish_reason != GIVEN, np.uint8) for part in self._parts]
            )
        turns = tuple(self._turns)
        return replace(whole, finish_reason=self._finish_reason, loss_mask=mask, turns=turns, failure=self._failure)


def sampled_parts(sequence: SampledSequence) -> list[np.ndarray]:
    """The token ids of each turn of the policy."""
    if sequence.loss_mask is None:
        return [sequence.token_ids]
    cuts = np.flatnonzero(np.diff(sequence.loss_mask)) + 1
    return np.split(sequence.token_ids, cuts)[::2]  # the first part is sampled


def _with(turn: Turn, **changes: object) -> Turn:
    return msgspec.structs.replace(turn, **changes)


def _given_part(token_ids: np.ndarray) -> SampledSequence:
    """The answer as a part of the response: the routes of its tokens come with the next part."""
    count = len(token_ids)
    return SampledSequence(
        token_ids=token_ids,
        log_probs=np.full(count, NO_LOG_PROB, np.float32),
        policy_versions=np.full(count, NOT_SAMPLED, np.int32),
        finish_reason=GIVEN,
    )


def _described(error: Exception, timeout_s: float | None) -> str:
    if isinstance(error, TimeoutError) and timeout_s is not None:
        return f"the environment has not answered within environment.timeout_s = {timeout_s:g} s"
    return recordable(f"the environment raised {type(error).__name__}: {' '.join(str(error).split())}")
