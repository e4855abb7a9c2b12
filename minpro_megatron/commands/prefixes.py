"""Make the training prompts of PrefixRL (arXiv:2601.18795): hard prompts, with prefixes of correct responses to them.

    minpro prefixes --model HF_DIR --prompts hard.jsonl --output hard_with_prefixes.jsonl

A base model samples each prompt until one response is correct (rejection sampling), at most --max-samples times. Such
a trace is cut at --prefixes positions, drawn uniformly between --shortest and --longest of its tokens. The part before
a cut becomes the row's `prefix`: context that a run's responses continue, without loss. The prompts without prefix are
rows too, so three prefixes per problem make prefixed and plain prompts 3:1. Prompts without a correct response are
excluded, and counted in FILE.report.json.

Samples are kept in --samples-folder: the same command resumes after an interruption, and with other cuts samples
nothing again. The servers are started by this command, or are external ones given with --urls.
"""

import argparse
import asyncio
import json
import math
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minpro_megatron.command_line import command_parser, count, share
from minpro_megatron.config.options import given_settings, with_flags
from minpro_megatron.config.reward import RIGHT_REWARD, is_right
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import FAILED, ProjectError, UserError, report, run_reporting
from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse, SampleFile
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.launch.evaluation import serving
from minpro_megatron.launch.evaluation_options import (
    FLAGS,
    SETTING_OPTIONS,
    EvaluationOptions,
    naming_flags,
    run_config,
)
from minpro_megatron.launch.evaluation_prompts import read_benchmarks, sampling_settings
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.prompts import TokenizedPrompt
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt
from minpro_megatron.rewards.registry import check_reward_name
from minpro_megatron.roles.evaluate import EvaluationError, Sampler, Task, plan

# The options of `eval`; the prompts of a run have its instruction, and every token may be sampled.
_OWN_DEFAULTS = {"data.instruction": "none", "evaluation.top_p": 1.0}
OPTIONS = {
    title: [replace(option, default=_OWN_DEFAULTS.get(option.setting, option.default)) for option in group]
    for title, group in SETTING_OPTIONS.items()
}
PROMPTS = "prompts"  # the name in the file of samples
FIRST_SAMPLES = 8  # of every prompt; then twice as many of those without a correct one, and so on


class Texts(Protocol):
    """The methods of TextTokenizer that cutting needs."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def text(self, token_ids: np.ndarray) -> str: ...


@dataclass(frozen=True)
class Cuts:
    """How traces are cut: `count` cuts, at fractions of their tokens between the two limits."""

    count: int
    shortest: float
    longest: float
    seed: int


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


def cut_places(num_tokens: int, cuts: Cuts) -> range:
    """The numbers of tokens at which a trace of `num_tokens` may be cut; at least one token remains on both sides."""
    # rounded: 0.7 * 10 tokens is more than 7 in floating point
    first, last = round(cuts.shortest * num_tokens, 9), round(cuts.longest * num_tokens, 9)
    return range(max(1, math.ceil(first)), math.floor(last) + 1)


def prefixes_of(trace: str, prompt_id: str, tokenizer: Texts, cuts: Cuts) -> list[str]:
    """Up to `cuts.count` different prefixes of `trace`, shortest first. They depend only on the seed and the id.

    All positions are equally likely, except those where the prefix's text would be tokenized differently from the
    beginning of the trace (inside a character of several tokens, for example): the policy must see what was sampled.
    """
    (token_ids,) = tokenizer.encode_all([trace])
    places = list(cut_places(len(token_ids), cuts))
    random.Random(derive_seed(cuts.seed, f"prefixes/{prompt_id}")).shuffle(places)
    kept: dict[int, str] = {}
    for place in places:
        if len(kept) == cuts.count:
            break
        text = tokenizer.text(token_ids[:place])
        (again,) = tokenizer.encode_all([text])
        if np.array_equal(again, token_ids[:place]):
            kept[place] = text
    return [kept[place] for place in sorted(kept)]


def training_rows(
    prompts: Iterable[Prompt], traces: dict[str, str], tokenizer: Texts, cuts: Cuts
) -> list[dict[str, Any]]:
    """For each prompt with a trace its plain row, then one row per prefix, with ids of their own."""
    rows = []
    for prompt in prompts:
        if prompt.id not in traces:
            continue
        plain = {"id": prompt.id, "source": prompt.source, "prompt": prompt.text, "answer": prompt.answer}
        rows.append(plain if prompt.pass_rate is None else plain | {"pass_rate": prompt.pass_rate})
        for number, prefix in enumerate(prefixes_of(traces[prompt.id], prompt.id, tokenizer, cuts)):
            rows.append(plain | {"id": f"{prompt.id}#prefix-{number}", "prefix": prefix})
    return rows


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


def build(options: argparse.Namespace) -> int:
    """Samples, cuts and writes. Returns the exit status. Raises UserError and ValueError for errors in the input."""
    folder = options.samples_folder or options.output.with_suffix(".samples")
    asked = _evaluation_options(options, folder)
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


def _write(options: argparse.Namespace, rows: Sequence[dict[str, Any]], num_prompts: int, num_samples: int) -> None:
    plain = [row for row in rows if "prefix" not in row]
    if not plain:
        raise UserError("no prompt has a correct response: raise --max-samples, or use easier prompts")
    report = {
        "prompts": num_prompts,
        "samples": num_samples,
        "plain_rows": len(plain),  # the number of prompts with a correct response
        "prefixed_rows": len(rows) - len(plain),
    }
    replace_file(options.output, _json_lines(rows))
    if options.plain_output:
        replace_file(options.plain_output, _json_lines(plain))
    replace_file(options.output.with_suffix(".report.json"), json.dumps(report, indent=2) + "\n")
    for name, number in report.items():
        print(f"{number:8d} {name.replace('_', ' ')}")
    print(f"wrote {options.output}")


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _evaluation_options(options: argparse.Namespace, folder: Path) -> EvaluationOptions:
    every = [option for group in OPTIONS.values() for option in group]
    defaults = {option.setting: option.value for option in every if option.value is not None}
    return EvaluationOptions(
        model=options.model,
        benchmarks=[PROMPTS],
        benchmark_files={PROMPTS: options.prompts},
        samples={"": options.max_samples},
        output=folder,
        settings=defaults | given_settings(every, vars(options)),
    )


def parse_arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    add = parser.add_argument
    add("--model", required=True, metavar="HF_DIR", help="the base model that samples")
    add("--prompts", required=True, type=Path, metavar="FILE.jsonl", help="hard prompts, without prefixes")
    add("--output", required=True, type=Path, metavar="FILE.jsonl", help="data.train_file of a run")
    add("--plain-output", type=Path, metavar="FILE.jsonl", help="only their plain rows, for a run to compare with")
    add("--samples-folder", type=Path, metavar="DIR", help="folder of the samples (the output's name with .samples)")
    add = parser.add_argument_group("cuts").add_argument
    add("--prefixes", type=count, default=3, metavar="N", help="number of prefixes per problem (default: 3)")
    add("--shortest", type=share, default=0.4, metavar="X", help="least share of a trace's tokens (default: 0.4)")
    add("--longest", type=share, default=0.8, metavar="X", help="largest share of a trace's tokens (default: 0.8)")
    add("--max-samples", type=count, default=128, metavar="N", help="samples per prompt at most (default: 128)")
    for title, group in OPTIONS.items():
        container = parser.add_argument_group(title)
        for option in group:
            option.add_to(container)
    options = parser.parse_args(arguments)
    if options.shortest > options.longest:
        parser.error(f"--shortest {options.shortest:g} exceeds --longest {options.longest:g}: lower it")
    return options


def main(arguments: list[str] | None = None, prog: str = "minpro prefixes") -> int:
    """0 on success, 1 if sampling failed, 2 after a message about an error in the input."""
    options = parse_arguments(arguments, prog)

    def run() -> int:
        with naming_flags():
            return build(options)

    return run_reporting(run, reads_given_files=True)
