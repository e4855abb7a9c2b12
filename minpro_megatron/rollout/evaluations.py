"""Evaluations inside a run: which prompts at which versions, what is there and what is still due."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from minpro_megatron.config.run import RunConfig
from minpro_megatron.evaluation.sampling import HELDOUT, evaluate, evaluation_groups
from minpro_megatron.records import CollectedGroup, EvaluationResult, IssuedGroup, Prompt
from minpro_megatron.rollout.prompts import Rendering, TokenizedPrompt, load_prompts, tokenize
from minpro_megatron.rollout.staleness import evaluated_versions
from minpro_megatron.rollout.tokenizer import TextTokenizer
from minpro_megatron.serving.client import SamplingParameters

CollectGroup = Callable[[IssuedGroup, SamplingParameters], Awaitable[CollectedGroup]]


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Prompts that are evaluated together; `name` is a benchmark's, or HELDOUT."""

    name: str
    prompts: Sequence[TokenizedPrompt]
    samples_per_prompt: int


def load_benchmarks(config: RunConfig) -> list[list[Prompt]]:
    """The prompts of each of evaluation.benchmarks. Raises ValueError for a file that does not hold them."""
    found = []
    for place, benchmark in enumerate(config.evaluation.benchmarks):
        prompts = load_prompts(benchmark.file, f"evaluation.benchmarks[{place}].file")
        if benchmark.num_prompts is not None and benchmark.num_prompts > len(prompts):
            raise ValueError(
                f"evaluation.benchmarks[{place}].num_prompts = {benchmark.num_prompts}: {benchmark.file} has only "
                f"{len(prompts)} rows; lower it"
            )
        found.append(prompts[: benchmark.num_prompts])
    return found


def benchmark_sets(config: RunConfig, tokenizer: TextTokenizer, rendering: Rendering) -> list[EvaluationSet]:
    """The benchmarks as tokens. Raises ValueError as `load_benchmarks` does."""
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
    """The run's evaluations; `results` are those that have ended. While one is `under_way`, weights must not change."""

    def __init__(self, config: RunConfig, sets: Sequence[EvaluationSet], collect_group: CollectGroup) -> None:
        self.results: list[EvaluationResult] = []
        self.under_way = False
        self._sets = list(sets)
        self._seed = config.seed
        self._versions = set(evaluated_versions(config.num_global_steps, config.evaluation.every_steps))
        self._sampling = SamplingParameters(
            config.evaluation.temperature, config.sampling.max_response_tokens, config.evaluation.top_p
        )
        self._collect_group = collect_group

    def due(self, version: int) -> list[EvaluationSet]:
        """What is to be evaluated with `version` and has no result yet."""
        done = {result.benchmark for result in self.results if result.policy_version == version}
        return [chosen for chosen in self._sets if chosen.name not in done] if version in self._versions else []

    async def evaluate(self, chosen: EvaluationSet, version: int) -> EvaluationResult:
        """pass@1 of the set under the weights of now, which are those of `version`."""
        prompts = [(tokenized.prompt, tokenized.token_ids) for tokenized in chosen.prompts]
        groups = evaluation_groups(prompts, chosen.samples_per_prompt, self._seed, version, chosen.name)
        return await evaluate(groups, lambda group: self._collect_group(group, self._sampling), chosen.name)


def heldout_set(config: RunConfig, heldout: Sequence[TokenizedPrompt]) -> EvaluationSet:
    return EvaluationSet(HELDOUT, heldout, config.evaluation.samples_per_prompt)
