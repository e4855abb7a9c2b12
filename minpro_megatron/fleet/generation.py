"""Generation of groups: one group per server, failed groups moved and retried, every response rewarded."""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from minpro_megatron.errors import ProjectError
from minpro_megatron.fleet.dispatch import Ticket
from minpro_megatron.fleet.episodes import EpisodeRules, sampled_parts
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.held_server import HeldServer
from minpro_megatron.fleet.member import Key, MemberGone
from minpro_megatron.records import NOT_GRADED, CollectedGroup, IssuedGroup, Prompt, Response
from minpro_megatron.rewards.graders import Graders, SampledText
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters
from minpro_megatron.serving.errors import OutOfFiles, ServerError

log = logging.getLogger(__name__)

# Failures of a group that are not explained by the end of a server, each on a different server if there is one. The
# client itself retries after dropped connections and 5xx, so this number of failures means a permanent fault.
MAX_GROUP_FAILURES = 3
# Meanwhile connections of other groups close.
OUT_OF_FILES_PAUSE_S = 1.0


class ResponseDecoder(Protocol):
    def response_texts(self, responses: Sequence[np.ndarray]) -> list[str]: ...


def graded_texts(prompt: Prompt, texts: Sequence[str]) -> list[str]:
    """The texts to grade for responses to the prompt. A given prefix comes first; it may hold part of the answer."""
    return [prompt.prefix + text for text in texts]


def texts_to_grade(texts: Sequence[str], sequences: Sequence[SampledSequence]) -> list[SampledText]:
    """What the graders get for each sequence: token ids, like texts, without those that an environment gave."""
    return [
        SampledText(text, np.concatenate(sampled_parts(sequence)), sequence.finish_reason)
        for text, sequence in zip(texts, sequences, strict=True)
    ]


class GenerationError(ProjectError):
    """A group could not be sampled on healthy servers, even after retries."""


class GroupCollector:
    """Samples and rewards groups.

    Groups start in the order in which `collect` is called, so that later batches do not delay earlier ones.
    Evaluation groups start once no training group waits.
    """

    def __init__(
        self,
        fleet: Fleet,
        graders: Graders,
        tokenizer: ResponseDecoder,
        episodes: EpisodeRules | None = None,
    ) -> None:
        """`episodes`: the environment that answers the responses' turns; None: a response is one request."""
        self._fleet = fleet
        self._episodes = episodes
        self._graders = graders
        self._tokenizer = tokenizer
        self._tickets = itertools.count()

    async def collect(self, issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        """The group, sampled and rewarded. Waits while no server has capacity, a training group for at most
        `server.queue_timeout_s` each time. Raises GenerationError and FleetError.

        The remaining rewards of a training group are cancelled once one of its responses could not be graded.
        """
        sequences = await self.sample(issued, sampling)  # from here on the group occupies no server
        rewards, problem = await self._graded(issued, sequences)
        responses = [
            Response(
                token_ids=sequence.token_ids,
                rollout_log_probs=sequence.log_probs,
                policy_versions=sequence.policy_versions,
                finish_reason=sequence.finish_reason,
                reward=reward,
                loss_mask=sequence.loss_mask,
                turns=list(sequence.turns),
                routed_experts=sequence.routed_experts,
                supports=sequence.supports,
            )
            for sequence, reward in zip(sequences, rewards, strict=True)
        ]
        return CollectedGroup(issued=issued, responses=responses, grading_problem=problem)

    async def _graded(self, issued: IssuedGroup, sequences: Sequence[SampledSequence]) -> tuple[list[float], str]:
        """(reward of each sequence, why one could not be graded). A response whose environment failed is not graded."""
        prompt, failures = issued.prompt, [sequence.failure for sequence in sequences]
        if not issued.is_evaluation and any(failures):
            return [NOT_GRADED] * len(sequences), next(filter(None, failures))
        texts = graded_texts(prompt, await self.response_texts(sequences))
        judged = await self._graders.judge(
            prompt, texts_to_grade(texts, sequences), stop_at_failure=not issued.is_evaluation
        )
        rewards = [NOT_GRADED if found.reward is None else found.reward for found in judged]
        rewards += [NOT_GRADED] * (len(texts) - len(rewards))
        rewards = [NOT_GRADED if failed else reward for reward, failed in zip(rewards, failures, strict=True)]
        problems = [*failures, *(found.problem for found in judged)]
        return rewards, next(filter(None, problems), "")

    async def response_texts(self, sequences: Sequence[SampledSequence]) -> list[str]:
        """The text of each sequence as the grader receives it: what the policy wrote, one turn after the other. A given
        prefix is not in it, nor is what an environment gave: printing an answer is not the same as giving it."""
        parts = [sampled_parts(sequence) for sequence in sequences]
        # In a thread: a group may have 150,000 tokens, and other answers should not wait while they are decoded.
        ids = [ids for of_sequence in parts for ids in of_sequence]
        texts = iter(await asyncio.to_thread(self._tokenizer.response_texts, ids))
        return ["\n".join(next(texts) for _ in of_sequence) for of_sequence in parts]

    async def sample(self, issued: IssuedGroup, sampling: SamplingParameters) -> list[SampledSequence]:
        """Only the group's sequences; otherwise as `collect`."""
        fleet, ticket = self._fleet, Ticket(issued.is_evaluation, next(self._tickets))
        episodes = self._episodes.begin(issued, sampling) if self._episodes else None
        num_requests = len(issued.sampling_seeds)
        tried: set[Key] = set()
        num_failures = 0
        while True:
            member = await fleet.acquire(ticket, num_requests, tried)
            tried.add(member.key)
            try:
                if episodes:
                    sequences = await episodes.run(HeldServer(fleet, member))
                else:
                    sequences = await member.generate(
                        issued.prompt_token_ids, issued.sampling_seeds, sampling, issued.policy_version
                    )
                fleet.count("groups")
                return sequences
            except MemberGone as error:
                fleet.count("moved_groups")
                log.warning("group %d moves: %s", issued.group_id, error)
            except OutOfFiles as error:
                tried.discard(member.key)
                fleet.out_of_files(error)
                await asyncio.sleep(OUT_OF_FILES_PAUSE_S)
            except ServerError as error:
                num_failures += await fleet.failed(member, error)
                fleet.count("retries")
                log.warning("group %d, failure %d: %s", issued.group_id, num_failures, error)
                if num_failures == MAX_GROUP_FAILURES:
                    raise GenerationError(
                        f"group {issued.group_id} (prompt {issued.prompt.id!r}): {num_failures} attempts failed on "
                        f"servers that answer; the last one: {error}"
                    ) from None
            finally:
                fleet.release(member, num_requests)
