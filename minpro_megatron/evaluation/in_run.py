"""Evaluations during a run: which prompts at which versions, which results exist and which are still due.

An evaluation that fails is reported and skipped. It only measures the run, which continues without it.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from minpro_megatron.buffer.staleness import evaluated_versions
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.sampling import HELDOUT, EvaluationNotGraded, evaluate, evaluation_groups
from minpro_megatron.fleet.generation import GenerationError
from minpro_megatron.prompts.prompts import TokenizedPrompt, load_prompts, tokenize
from minpro_megatron.prompts.rendering import Rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import CollectedGroup, EvaluationResult, IssuedGroup, Prompt
from minpro_megatron.serving.client import SamplingParameters

log = logging.getLogger(__name__)

CollectGroup = Callable[[IssuedGroup, SamplingParameters], Awaitable[CollectedGroup]]


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Prompts that are evaluated together; `name` is a benchmark's name, or HELDOUT."""

    name: str
    prompts: Sequence[TokenizedPrompt]
    samples_per_prompt: int


def load_benchmarks(config: RunConfig) -> list[list[Prompt]]:
    """The prompts of each of evaluation.benchmarks. Raises UserError if a file does not have them."""
    found = []
    for place, benchmark in enumerate(config.evaluation.benchmarks):
        prompts = load_prompts(benchmark.file, f"evaluation.benchmarks[{place}].file")
        if benchmark.num_prompts is not None and benchmark.num_prompts > len(prompts):
            raise UserError(
                f"evaluation.benchmarks[{place}].num_prompts = {benchmark.num_prompts}: {benchmark.file} has only "
                f"{len(prompts)} rows; lower it"
            )
        found.append(prompts[: benchmark.num_prompts])
    return found


def benchmark_sets(config: RunConfig, tokenizer: TextTokenizer, rendering: Rendering) -> list[EvaluationSet]:
    """The benchmarks as tokens. Raises UserError as `load_benchmarks` does."""
    longest = config.sampling.max_prompt_tokens
    return [
        EvaluationSet(
            benchmark.name,
            tokenize(prompts, tokenizer, longest, f"evaluation.benchmarks {benchmark.name}", rendering),
            benchmark.samples_per_prompt,
        )
        for benchmark, prompts in zip(config.evaluation.benchmarks, load_benchmarks(config), strict=True)
    ]


class Evaluations:
    """The run's evaluations; `results` holds the successful ones. While an evaluation is `under_way`, the weights must
    not change."""

    def __init__(self, config: RunConfig, sets: Sequence[EvaluationSet], collect_group: CollectGroup) -> None:
        self.results: list[EvaluationResult] = []
        self.under_way = False
        self._failed: set[tuple[int, str]] = set()  # (version, name) of sets that are not evaluated again
        self._sets = list(sets)
        self._group_size = config.batch.responses_per_prompt
        self._seed = config.seed
        self._versions = set(evaluated_versions(config.num_global_steps, config.evaluation.every_steps))
        self._sampling = SamplingParameters(
            config.evaluation.temperature, config.sampling.max_response_tokens, config.evaluation.top_p
        )
        self._collect_group = collect_group
        self._right_reward = config.reward.right_reward

    def due(self, version: int) -> list[EvaluationSet]:
        """The sets to be evaluated with `version` that have no result yet and have not failed."""
        if version not in self._versions:
            return []
        done = {(result.policy_version, result.benchmark) for result in self.results} | self._failed
        return [chosen for chosen in self._sets if (version, chosen.name) not in done]

    async def evaluate(self, chosen: EvaluationSet, version: int) -> EvaluationResult | None:
        """pass@1 and mean reward of the set under the current weights, which are those of `version`. None if some of
        its samples could not be obtained, or none of them could be graded; the set is then no longer due."""
        prompts = [(tokenized.prompt, tokenized.token_ids) for tokenized in chosen.prompts]
        groups = evaluation_groups(
            prompts, chosen.samples_per_prompt, self._seed, version, chosen.name, max_group_size=self._group_size
        )
        try:
            return await evaluate(
                groups, lambda group: self._collect_group(group, self._sampling), chosen.name, self._right_reward
            )
        except (GenerationError, EvaluationNotGraded) as error:
            # A score over only the prompts that succeeded would be biased towards easy ones.
            self._failed.add((version, chosen.name))
            log.error(
                "version %d: the evaluation on %s failed, the run continues without it: %s",
                version, chosen.name or "the held-out prompts", error,
            )  # fmt: skip
            return None

    def metrics(self) -> dict[str, float]:
        """Totals since the start, for the lease."""
        return {"fleet/failed_evaluations": float(self.num_failed)}

    @property
    def num_failed(self) -> int:
        return len(self._failed)


def heldout_set(config: RunConfig, heldout: Sequence[TokenizedPrompt]) -> EvaluationSet:
    return EvaluationSet(HELDOUT, heldout, config.evaluation.samples_per_prompt)
