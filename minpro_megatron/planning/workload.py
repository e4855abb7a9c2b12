"""The assumed lengths of prompts and responses, which a run's settings do not state."""

import math
import random
from dataclasses import dataclass
from functools import cache

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import UserError
from minpro_megatron.planning.cost_model import Batch
from minpro_megatron.planning.simulator import Lengths

QUANTILES = 512
# Default assumptions: a response has this share of sampling.max_response_tokens, and a prompt has the number of tokens
# of a competition problem with its instruction.
RESPONSE_SHARE = 0.4
PROMPT_TOKENS = 200
SPREAD = 0.7  # standard deviation of the log of a response's length, before truncation at the limit


@dataclass(frozen=True)
class Workload:
    """Lengths of responses are log-normal, truncated at sampling.max_response_tokens; `mean_response_tokens` is the
    mean after the truncation."""

    mean_prompt_tokens: float
    mean_response_tokens: float
    spread: float = SPREAD

    @staticmethod
    def of(config: RunConfig, response_tokens: float | None = None, prompt_tokens: float | None = None) -> "Workload":
        """The given means, and assumptions for the others. Raises ValueError for a mean beyond the run's limits."""
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
        return Workload(prompt, response)


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
        self._seed, self._purpose = config.seed, purpose
        self._drawn: dict[int, Lengths] = {}

    def __call__(self, group: int) -> Lengths:
        if group not in self._drawn:
            self._drawn[group] = self._draw(group)
        return self._drawn[group]

    def _draw(self, group: int) -> Lengths:
        draw = random.Random(derive_seed(self._seed, self._purpose, group))
        return Lengths(self._prompt, [draw.choice(self._quantiles) for _ in range(self._per_group)])


def batch_of(config: RunConfig, workload: Workload) -> Batch:
    prompt = max(1, round(workload.mean_prompt_tokens))
    responses = response_quantiles(workload, config.sampling.max_response_tokens)
    return Batch(
        sequence_tokens=[prompt + response for response in responses],
        num_sequences=config.batch.num_prompts * config.batch.responses_per_prompt,
    )
