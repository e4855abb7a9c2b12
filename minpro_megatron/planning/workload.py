"""The assumed lengths of prompts and responses, which a run's settings do not state."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import UserError
from minpro_megatron.planning.cost_model import Batch
from minpro_megatron.planning.simulated_server import Lengths

QUANTILES = 512
# Default assumptions: a response has this share of sampling.max_response_tokens, and a prompt has the number of tokens
# of a competition problem with its instruction.
RESPONSE_SHARE = 0.4
PROMPT_TOKENS = 200
SPREAD = 0.7  # standard deviation of the log of a response's length, before truncation at the limit
# An environment's answer, if responses have room for it: a few printed numbers or the last lines of an error, with the
# template's markers.
ANSWER_TOKENS = 100
# An environment's time for it. The Python tool takes 0.12 s of processor time for a line of code, on two busy cores 0.3
# to 0.6 s; the policy's programs compute and import more.
ANSWER_S = 1.0
# The shortest responses have fewer turns than the others. A given mean is kept if the mean of all is this share of it.
_KEPT_SHARE = 0.95


@dataclass(frozen=True)
class Workload:
    """Lengths of responses are log-normal, truncated at sampling.max_response_tokens; `mean_response_tokens` is the
    mean after the truncation. In episodes it includes the tokens that the environment gives."""

    mean_prompt_tokens: float
    mean_response_tokens: float
    spread: float = SPREAD
    episodes: "EpisodeWorkload | None" = None  # for a run with an environment

    @staticmethod
    def of(
        config: RunConfig,
        response_tokens: float | None = None,
        prompt_tokens: float | None = None,
        turns: float | None = None,
        answer_tokens: int | None = None,
        answer_s: float | None = None,
    ) -> "Workload":
        """The given means, and assumptions for the others. Raises UserError for a mean beyond the run's limits, for
        turns and answers that such responses cannot have, and for those of a run without an environment."""
        limit, prompts = config.sampling.max_response_tokens, config.sampling.max_prompt_tokens
        response = RESPONSE_SHARE * limit if response_tokens is None else response_tokens
        prompt = min(PROMPT_TOKENS, prompts) if prompt_tokens is None else prompt_tokens
        if not 0 < response <= limit:
            raise UserError(
                f"mean response tokens = {response:g} must be above 0 and at most "
                f"sampling.max_response_tokens = {limit}"
            )
        if not 0 < prompt <= prompts:
            raise UserError(
                f"mean prompt tokens = {prompt:g} must be above 0 and at most sampling.max_prompt_tokens = {prompts}"
            )
        return Workload(prompt, response, episodes=EpisodeWorkload.of(config, response, turns, answer_tokens, answer_s))


@dataclass(frozen=True)
class EpisodeWorkload:
    """What is assumed of the episodes of a run with an environment."""

    mean_turns: float  # of the policy, in what is simulated
    turns_if_long: float  # the mean of responses that are long enough for so many answers
    answer_tokens: int  # of each of the environment's answers, with its markers
    answer_s: float  # seconds until the environment has answered

    @staticmethod
    def of(
        config: RunConfig,
        response_tokens: float,
        turns: float | None,
        answer_tokens: int | None,
        answer_s: float | None,
    ) -> "EpisodeWorkload | None":
        """The given means, and assumptions for the others; None for a run without an environment. `response_tokens`:
        the mean of a response."""
        if not config.environment.enabled:
            given = {"mean turns": turns, "answer tokens": answer_tokens, "answer seconds": answer_s}
            for name, value in given.items():
                if value is not None:
                    raise UserError(
                        f"{name} = {value:g}: this is of episodes, and environment.name = none has none; leave it "
                        "out, or set environment.name"
                    )
            return None
        most, limit = config.sampling.max_turns, config.sampling.max_response_tokens
        wanted = (1 + most) / 2 if turns is None else turns  # any number of turns is as likely as another
        if not 1 <= wanted <= most:
            raise UserError(f"mean turns = {wanted:g} must be at least 1 and at most sampling.max_turns = {most}")
        tokens = _default_answer(response_tokens, wanted) if answer_tokens is None else answer_tokens
        if tokens >= limit:
            raise UserError(
                f"answer tokens = {tokens} must be below sampling.max_response_tokens = {limit}, because an answer is "
                "part of the response; lower it"
            )
        mean = _mean_turns(wanted, tokens, _quantiles(response_tokens, SPREAD, limit))
        if turns is not None and mean < _KEPT_SHARE * turns:
            raise UserError(
                f"mean turns = {turns:g} cannot be kept: with answers of {tokens} tokens in responses of "
                f"{response_tokens:g} on average, of which answers are at most half, the mean is {mean:.3g}; lower the "
                "mean turns or the answer tokens, or raise the mean response tokens"
            )
        return EpisodeWorkload(mean, wanted, tokens, ANSWER_S if answer_s is None else answer_s)

    def turns(self, response_tokens: int, draw: random.Random) -> int:
        """Of a response of that length: `turns_if_long` rounded up or down, or fewer if answers were more than half."""
        whole = int(self.turns_if_long) + (draw.random() < self.turns_if_long % 1)
        return min(whole, _most_turns(response_tokens, self.answer_tokens))


def _default_answer(response_tokens: float, turns: float) -> int:
    """Tokens of an answer: the assumption, or less, so that a response of the mean length holds the answers."""
    answers = max(1, math.ceil(turns) - 1)
    return min(ANSWER_TOKENS, int(response_tokens / (2 * answers)))


def _most_turns(response_tokens: int, answer_tokens: int) -> int:
    """Of a response of that length, of which answers are at most half."""
    return 1 + response_tokens // (2 * max(1, answer_tokens))


def _mean_turns(wanted: float, answer_tokens: int, responses: Sequence[int]) -> float:
    """The mean that `EpisodeWorkload.turns` has over equally likely responses of these lengths."""
    whole, share = int(wanted), wanted % 1
    limits = [_most_turns(response, answer_tokens) for response in responses]
    return sum((1 - share) * min(whole, most) + share * min(whole + 1, most) for most in limits) / len(limits)


def response_quantiles(workload: Workload, limit: int) -> list[int]:
    """Lengths of `QUANTILES` equally likely responses, ascending."""
    return list(_quantiles(workload.mean_response_tokens, workload.spread, limit))


@cache
def _quantiles(mean: float, spread: float, limit: int) -> tuple[int, ...]:
    shapes = [math.exp(spread * _normal_quantile((place + 0.5) / QUANTILES)) for place in range(QUANTILES)]

    def mean_at(scale: float) -> float:
        return sum(min(limit, scale * shape) for shape in shapes) / QUANTILES

    low, high = 0.0, limit / shapes[0]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) < mean else (low, middle)
    return tuple(max(1, min(limit, round(high * shape))) for shape in shapes)


def _normal_quantile(share: float) -> float:
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) < 2 * share - 1 else (low, middle)
    return low


class GroupLengths:
    """The lengths of any group, the same for the same seed, purpose and number."""

    def __init__(self, config: RunConfig, workload: Workload, purpose: str = "planned lengths") -> None:
        self._quantiles = response_quantiles(workload, config.sampling.max_response_tokens)
        self._prompt = max(1, round(workload.mean_prompt_tokens))
        self._per_group = config.batch.responses_per_prompt
        self._episodes = workload.episodes
        self._seed, self._purpose = config.seed, purpose
        self._drawn: dict[int, Lengths] = {}

    def __call__(self, group: int) -> Lengths:
        if group not in self._drawn:
            self._drawn[group] = self._draw(group)
        return self._drawn[group]

    def _draw(self, group: int) -> Lengths:
        draw = random.Random(derive_seed(self._seed, self._purpose, group))
        responses = [draw.choice(self._quantiles) for _ in range(self._per_group)]
        if self._episodes is None:
            return Lengths(self._prompt, responses)
        turns = [self._episodes.turns(response, draw) for response in responses]
        return Lengths(self._prompt, responses, turns, self._episodes.answer_tokens, self._episodes.answer_s)


def batch_of(config: RunConfig, workload: Workload) -> Batch:
    prompt = max(1, round(workload.mean_prompt_tokens))
    responses = response_quantiles(workload, config.sampling.max_response_tokens)
    return Batch(
        sequence_tokens=[prompt + response for response in responses],
        num_sequences=config.batch.num_prompts * config.batch.responses_per_prompt,
    )
