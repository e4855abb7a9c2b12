"""The cost of an evaluation during a run: its number of responses, and the time for which the run waits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.buffer.staleness import evaluated_versions
from minpro_megatron.config.evaluation import BenchmarkConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.evaluation.benchmarks import BENCHMARKS
from minpro_megatron.evaluation.sampling import HELDOUT
from minpro_megatron.planning.simulated_server import Lengths
from minpro_megatron.planning.simulator import Timeline
from minpro_megatron.planning.workload import GroupLengths, Workload
from minpro_megatron.prompts.prompts import load_prompts

# Assumed number of prompts of a custom benchmark whose file is not on this machine.
ASSUMED_PROMPTS = 500


@dataclass(frozen=True)
class EvaluationCost:
    """One evaluation in the middle of a run. It needs no memory in addition to that of a training batch: servers
    process the same number of responses, and the collector keeps two numbers per response."""

    responses: int
    groups: int  # requests, of at most batch.responses_per_prompt responses
    seconds: float  # from the publication of its version to its last sample
    added_s: float  # additional time of the run
    share_of_responses: float  # of all responses that the servers sample in the run
    times: int  # in the entire run
    assumed: tuple[str, ...]  # benchmarks whose files are not on this machine: planned with ASSUMED_PROMPTS


def evaluation_lengths(config: RunConfig, workload: Workload) -> list[Lengths]:
    """The groups of an evaluation, in the order in which they are requested, with lengths as in training."""
    settings, size = config.evaluation, config.batch.responses_per_prompt
    sets = [(HELDOUT, settings.num_prompts, settings.samples_per_prompt)]
    for benchmark in settings.benchmarks:
        prompts = known_prompts(benchmark) or ASSUMED_PROMPTS
        sets.append((benchmark.name, prompts, benchmark.samples_per_prompt))
    found: list[Lengths] = []
    for name, prompts, samples in sets:
        draw = GroupLengths(config, workload, f"planned lengths of evaluation {name}")
        parts = [min(size, samples - first) for first in range(0, samples, size)]
        for group in range(prompts * len(parts)):
            lengths = draw(group)
            found.append(lengths.first(parts[group % len(parts)]))
    return found


def known_prompts(benchmark: BenchmarkConfig) -> int | None:
    """The number of evaluated prompts of a benchmark: the setting, the number in its file if it exists here, or that of
    the known benchmark with this name; None if none of these is available."""
    if benchmark.num_prompts is not None:
        return benchmark.num_prompts
    if Path(benchmark.file).is_file():
        return len(load_prompts(benchmark.file, f"evaluation.benchmarks {benchmark.name}"))
    return BENCHMARKS[benchmark.name].num_prompts if benchmark.name in BENCHMARKS else None


def evaluation_cost(
    config: RunConfig, groups: Sequence[Lengths], version: int, without: Timeline, with_evaluation: Timeline
) -> EvaluationCost:
    """The cost from two simulations of the same steps, one of which evaluates `version`."""
    start, end = with_evaluation.evaluations[version]
    responses = sum(len(group.responses) for group in groups)
    times = len(evaluated_versions(config.num_global_steps, config.evaluation.every_steps))
    trained = config.num_global_steps * config.batch.num_prompts * config.batch.responses_per_prompt
    return EvaluationCost(
        responses=responses,
        groups=len(groups),
        seconds=end - start,
        added_s=with_evaluation.step_ends[-1] - without.step_ends[-1],
        share_of_responses=times * responses / (times * responses + trained),
        times=times,
        assumed=tuple(one.name for one in config.evaluation.benchmarks if known_prompts(one) is None),
    )
