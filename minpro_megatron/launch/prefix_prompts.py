"""The work of the command `prefixes`: samples hard prompts until one response is correct, and writes its prefixes."""

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpro_megatron.config.options import with_flags
from minpro_megatron.config.reward import RIGHT_REWARD, is_right
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import FAILED, ProjectError, UserError, report
from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse, SampleFile
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.launch.evaluation import serving
from minpro_megatron.launch.evaluation_options import FLAGS, EvaluationOptions, run_config
from minpro_megatron.launch.evaluation_prompts import read_benchmarks, sampling_settings
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompt_sets.prefixes import Cuts, training_rows
from minpro_megatron.prompts.prompts import TokenizedPrompt
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.rewards.registry import check_reward_name
from minpro_megatron.roles.evaluate import EvaluationError, Sampler, Task, plan

PROMPTS = "prompts"  # the name in the file of samples
FIRST_SAMPLES = 8  # of every prompt; then twice as many of those without a correct one, and so on


@dataclass(frozen=True, kw_only=True)
class PrefixOptions:
    """The options of the command line. `settings`: by `section.key`, those of the servers, sampling and grading."""

    model: str
    prompts: Path
    output: Path
    plain_output: Path | None
    samples_folder: Path | None
    prefixes: int
    shortest: float
    longest: float
    max_samples: int
    settings: Mapping[str, Any]


def text_of_right(response: SampledResponse) -> str:
    """The text if the response is correct. Most responses are wrong, and their texts are not needed."""
    return response.text if is_right(response.reward, RIGHT_REWARD) else ""


def first_right_responses(groups: Iterable[SampledGroup]) -> dict[str, str]:
    """By prompt id: the correct response of the smallest sample number. Truncated responses do not count."""
    found: dict[str, tuple[int, str]] = {}
    for group in groups:
        for number, response in enumerate(group.responses, start=group.first_sample):
            is_trace = is_right(response.reward, RIGHT_REWARD) and response.finish_reason == "stop"
            if is_trace and (group.prompt_id not in found or number < found[group.prompt_id][0]):
                found[group.prompt_id] = number, response.text
    return {prompt_id: text for prompt_id, (_, text) in found.items()}


def next_tasks(
    prompts: Sequence[TokenizedPrompt], groups: Sequence[SampledGroup], max_samples: int, seed: int
) -> list[Task]:
    """The next samples of the prompts without a correct response; none if all that are allowed exist."""
    solved = first_right_responses(groups)
    unsolved = [prompt for prompt in prompts if prompt.prompt.id not in solved]
    done = {group.key for group in groups}
    wanted = min(FIRST_SAMPLES, max_samples)
    while True:
        tasks = plan({PROMPTS: unsolved}, {PROMPTS: wanted}, seed, done)
        if tasks or wanted == max_samples:
            return tasks
        wanted = min(2 * wanted, max_samples)


async def sample_traces(
    config: RunConfig, file: SampleFile, prompts: Sequence[TokenizedPrompt], max_samples: int, seed: int
) -> None:
    """Samples what is missing into `file`, with its own servers or with external ones.

    Raises EvaluationError, FleetError, GenerationError or RewardWorkerError.
    """
    incarnation = os.getpid()
    async with serving(config, incarnation) as ended:
        while True:
            groups = list(file.groups(text_of_right))
            tasks = next_tasks(prompts, groups, max_samples, seed)
            if not tasks:
                return
            sampler = Sampler(config, incarnation, file, lambda group: None, lambda: None)
            work = asyncio.create_task(sampler.run(tasks, groups[0].policy_version if groups else None))
            try:
                await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    log_file = config.run_dir / "logs" / "serve.log"
                    raise EvaluationError(f"the servers' role has ended; see {log_file}")
                work.result()
            finally:
                work.cancel()
                await asyncio.wait({work})
            _tell(prompts, list(file.groups(text_of_right)))


def _tell(prompts: Sequence[TokenizedPrompt], groups: Sequence[SampledGroup]) -> None:
    drawn = sum(len(group.responses) for group in groups)
    print(f"{drawn} samples: {len(first_right_responses(groups))} of {len(prompts)} prompts have a correct response")


def make_prefixes(options: PrefixOptions) -> int:
    """Samples, cuts and writes. Returns the exit status. Raises UserError and ValueError for errors in the input."""
    folder = options.samples_folder or options.output.with_suffix(".samples")
    asked = EvaluationOptions(
        model=options.model,
        benchmarks=[PROMPTS],
        benchmark_files={PROMPTS: options.prompts},
        samples={"": options.max_samples},
        output=folder,
        settings=options.settings,
    )
    config = run_config(asked)
    check_reward_name(config.reward.function, "--reward")
    prompts = read_benchmarks(asked, config)
    if given := [prompt.prompt.id for prompt in prompts[PROMPTS] if prompt.prompt.prefix]:
        raise UserError(f"--prompts {options.prompts}: {given[0]!r} has a prefix already; give prompts without prefix")
    with SampleFile(folder, sampling_settings(asked, config, prompts)) as file:
        if next_tasks(prompts[PROMPTS], list(file.groups(text_of_right)), options.max_samples, config.seed):
            try:
                asyncio.run(sample_traces(config, file, prompts[PROMPTS], options.max_samples, config.seed))
            except ProjectError as error:
                report(with_flags(error, FLAGS), "error")
                print("the same command resumes with the samples so far", file=sys.stderr)
                return FAILED
        groups = list(file.groups(text_of_right))
    tokenizer = TextTokenizer(asked.model, read_model_facts(asked.model, config.sampling.extra_stop_tokens))
    cuts = Cuts(options.prefixes, options.shortest, options.longest, config.seed)
    rows = training_rows([one.prompt for one in prompts[PROMPTS]], first_right_responses(groups), tokenizer, cuts)
    _write(options, rows, len(prompts[PROMPTS]), sum(len(group.responses) for group in groups))
    return 0


def _write(options: PrefixOptions, rows: Sequence[dict[str, Any]], num_prompts: int, num_samples: int) -> None:
    plain = [row for row in rows if "prefix" not in row]
    if not plain:
        raise UserError("no prompt has a correct response: raise --max-samples, or use easier prompts")
    counts = {
        "prompts": num_prompts,
        "samples": num_samples,
        "plain_rows": len(plain),  # the number of prompts with a correct response
        "prefixed_rows": len(rows) - len(plain),
    }
    replace_file(options.output, _json_lines(rows))
    if options.plain_output:
        replace_file(options.plain_output, _json_lines(plain))
    replace_file(options.output.with_suffix(".report.json"), json.dumps(counts, indent=2) + "\n")
    for name, number in counts.items():
        print(f"{number:8d} {name.replace('_', ' ')}")
    print(f"wrote {options.output}")


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
