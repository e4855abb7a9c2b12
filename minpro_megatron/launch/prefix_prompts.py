"""The work of the command `prefixes`: a correct response to each hard prompt, its cuts, and the rows that they make."""

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpro_megatron.config.environment import NO_ENVIRONMENT
from minpro_megatron.config.options import with_flags
from minpro_megatron.config.reward import RIGHT_REWARD, is_right
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import FAILED, ProjectError, UserError, report
from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse, SampleFile
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.fleet.open_files import raise_file_limit
from minpro_megatron.launch.evaluation import serving
from minpro_megatron.launch.evaluation_options import FLAGS
from minpro_megatron.launch.evaluation_prompts import sampling_settings
from minpro_megatron.launch.given_traces import GivenTraces, add_traces_of_run, add_traces_of_texts
from minpro_megatron.launch.measured_cuts import MeasuredCuts
from minpro_megatron.launch.own_prompts import PROMPTS, check_written_files, read_own_prompts
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompt_sets.cut_search import Band
from minpro_megatron.prompt_sets.prefixes import Cuts, Prefix, Trace, prefixes_of, training_rows
from minpro_megatron.prompts.prompts import TokenizedPrompt
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.roles.evaluate import EvaluationError, Sampler, Task, plan

FIRST_SAMPLES = 8  # of every prompt; then twice as many of those without a correct one, and so on
DEFAULT_MAX_SAMPLES = 128  # without other sources of traces


@dataclass(frozen=True, kw_only=True)
class PrefixOptions:
    """The options of the command line. `settings`: by `section.key`, those of the servers, sampling and grading."""

    model: str
    prompts: Path
    output: Path
    plain_output: Path | None
    demonstrations: Path | None
    samples_folder: Path | None
    runs: Sequence[Path]
    texts: Sequence[Path]
    max_samples: int | None
    prefixes: int
    shortest: float
    longest: float
    bands: Sequence[Band]
    cut_samples: int
    settings: Mapping[str, Any]

    @property
    def report(self) -> Path:
        return self.output.with_suffix(".report.json")

    @property
    def sampled_at_most(self) -> int:
        """Samples per prompt: with other sources of traces, none unless a number is given."""
        if self.max_samples is not None:
            return self.max_samples
        return 0 if self.runs or self.texts else DEFAULT_MAX_SAMPLES


def read_groups(file: SampleFile, right_reward: float) -> list[SampledGroup]:
    """The samples so far, with the texts of the correct ones: most are wrong, and their texts are not needed."""

    def text_of_right(response: SampledResponse) -> str:
        return response.text if is_right(response.reward, right_reward) else ""

    return list(file.groups(text_of_right))


def first_right_responses(groups: Iterable[SampledGroup], right_reward: float = RIGHT_REWARD) -> dict[str, str]:
    """By prompt id: the correct response of the smallest sample number. Truncated responses do not count."""
    found: dict[str, tuple[int, str]] = {}
    for group in groups:
        for number, response in enumerate(group.responses, start=group.first_sample):
            is_trace = group.benchmark == PROMPTS and response.finish_reason == "stop"
            if not is_trace or not is_right(response.reward, right_reward):
                continue
            if group.prompt_id not in found or number < found[group.prompt_id][0]:
                found[group.prompt_id] = number, response.text
    return {prompt_id: text for prompt_id, (_, text) in found.items()}


def next_tasks(
    prompts: Sequence[TokenizedPrompt],
    groups: Sequence[SampledGroup],
    max_samples: int,
    seed: int,
    right_reward: float = RIGHT_REWARD,
) -> list[Task]:
    """The next samples of the prompts without a correct response; none if all that are allowed exist."""
    solved = first_right_responses(groups, right_reward)
    unsolved = [prompt for prompt in prompts if prompt.prompt.id not in solved]
    done = {group.key for group in groups}
    wanted = min(FIRST_SAMPLES, max_samples)
    while True:
        tasks = plan({PROMPTS: unsolved}, {PROMPTS: wanted}, seed, done)
        if tasks or wanted == max_samples:
            return tasks
        wanted = min(2 * wanted, max_samples)


@dataclass(frozen=True)
class PrefixWork:
    """What is known before anything is sampled. Every method is a function of the samples so far."""

    options: PrefixOptions
    config: RunConfig
    prompts: Sequence[TokenizedPrompt]
    given: Mapping[str, Trace]
    tokenizer: TextTokenizer

    def traces(self, groups: Sequence[SampledGroup]) -> dict[str, Trace]:
        """Those that were given, and for the other prompts the sampled ones."""
        sampled = first_right_responses(groups, self.config.reward.right_reward)
        return {prompt_id: Trace(text) for prompt_id, text in sampled.items()} | dict(self.given)

    def next_tasks(self, groups: Sequence[SampledGroup]) -> list[Task]:
        """The next samples: first traces, then measurements of cuts. None: everything is known."""
        at_most, seed = self.options.sampled_at_most, self.config.seed
        if at_most:
            without = [prompt for prompt in self.prompts if prompt.prompt.id not in self.given]
            if tasks := next_tasks(without, groups, at_most, seed, self.config.reward.right_reward):
                return tasks
        return self._measured_cuts(groups).next_tasks(groups, seed) if self.options.bands else []

    def prefixes(self, groups: Sequence[SampledGroup]) -> dict[str, list[Prefix]]:
        """The prefixes of each prompt with a trace."""
        if self.options.bands:
            return self._measured_cuts(groups).found(groups)
        return {
            prompt_id: prefixes_of(trace, prompt_id, self.tokenizer, self._cuts)
            for prompt_id, trace in self.traces(groups).items()
        }

    @property
    def _cuts(self) -> Cuts:
        options = self.options
        return Cuts(options.prefixes, options.shortest, options.longest, self.config.seed)

    def _measured_cuts(self, groups: Sequence[SampledGroup]) -> MeasuredCuts:
        return MeasuredCuts(
            model=self.options.model,
            bands=self.options.bands,
            samples=self.options.cut_samples,
            right_reward=self.config.reward.right_reward,
            max_prompt_tokens=self.config.sampling.max_prompt_tokens,
            cuts=self._cuts,
            prompts=self.prompts,
            traces=self.traces(groups),
            tokenizer=self.tokenizer,
        )


async def sample_rounds(work: PrefixWork, file: SampleFile) -> None:
    """Samples what is missing into `file`, with its own servers or with external ones, until nothing is.

    Raises EvaluationError, FleetError, GenerationError or RewardWorkerError.
    """
    config, incarnation = work.config, os.getpid()
    async with serving(config, incarnation) as ended:
        while True:
            groups = read_groups(file, config.reward.right_reward)
            tasks = work.next_tasks(groups)
            if not tasks:
                return
            sampler = Sampler(config, incarnation, file, lambda group: None, lambda: None)
            running = asyncio.create_task(sampler.run(tasks, groups[0].policy_version if groups else None))
            try:
                await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not running.done():
                    log_file = config.run_dir / "logs" / "serve.log"
                    raise EvaluationError(f"the servers' role has ended; see {log_file}")
                running.result()
            finally:
                running.cancel()
                await asyncio.wait({running})
            _tell(work, read_groups(file, config.reward.right_reward))


def _tell(work: PrefixWork, groups: Sequence[SampledGroup]) -> None:
    drawn, traces = sum(len(group.responses) for group in groups), work.traces(groups)
    print(f"{drawn} samples: {len(traces)} of {len(work.prompts)} prompts have a correct response", flush=True)


def make_prefixes(options: PrefixOptions) -> int:
    """Samples, cuts and writes. Returns the exit status. Raises UserError and ValueError for errors in the input."""
    if (name := options.settings.get("environment.name", NO_ENVIRONMENT)) != NO_ENVIRONMENT:
        raise UserError(
            f"--environment = {name!r}: a trace is one turn of the model, and a response with an environment may have "
            "several; leave the option out"
        )
    check_written_files(
        {"--prompts": [options.prompts], "--texts": options.texts},
        {
            "--output": options.output,
            "--plain-output": options.plain_output,
            "--demonstrations": options.demonstrations,
            "the report of --output": options.report,
        },
    )
    folder = options.samples_folder or options.output.with_suffix(".samples")
    own = read_own_prompts(options.model, options.prompts, {}, folder, options.settings)
    config = own.config
    if given := [prompt.prompt.id for prompt in own.tokenized if prompt.prompt.prefix]:
        raise UserError(f"--prompts {options.prompts}: {given[0]!r} has a prefix already; give prompts without prefix")
    tokenizer = TextTokenizer(options.model, read_model_facts(options.model, config.sampling.extra_stop_tokens))
    traces = _given_traces(options, config, own.tokenized, tokenizer)
    work = PrefixWork(options, config, own.tokenized, traces.traces, tokenizer)
    settings = sampling_settings(own.asked, config, own.by_name, is_number_fixed=False)
    with SampleFile(folder, settings) as file:
        if work.next_tasks(read_groups(file, config.reward.right_reward)):
            raise_file_limit(config)
            try:
                asyncio.run(sample_rounds(work, file))
            except ProjectError as error:
                report(with_flags(error, FLAGS), "error")
                print("the same command resumes with the samples so far", file=sys.stderr)
                return FAILED
        groups = read_groups(file, config.reward.right_reward)
    _write(work, groups, traces)
    return 0


def _given_traces(
    options: PrefixOptions, config: RunConfig, tokenized: Sequence[TokenizedPrompt], tokenizer: TextTokenizer
) -> GivenTraces:
    """The traces of --runs and --texts, in this order. Says how many prompts have one."""
    given, prompts = GivenTraces(), [one.prompt for one in tokenized]
    for run_dir in options.runs:
        add_traces_of_run(given, run_dir, prompts, options.model)
        print(f"{run_dir}: {len(given.traces)} of {len(prompts)} prompts have a correct response", flush=True)
    for path in options.texts:
        add_traces_of_texts(given, path, prompts, tokenizer, config.reward)
        print(f"{path}: {len(given.traces)} of {len(prompts)} prompts have a correct response", flush=True)
    for reason, number in given.unused.items():
        print(f"not used: {number} {reason}")
    return given


def _write(work: PrefixWork, groups: Sequence[SampledGroup], given: GivenTraces) -> None:
    options, traces, prefixes = work.options, work.traces(groups), work.prefixes(groups)
    rows = training_rows([one.prompt for one in work.prompts], traces, prefixes)
    plain = [row for row in rows if "prefix" not in row]
    if not plain:
        raise UserError("no prompt has a correct response: raise --max-samples, or use easier prompts or other traces")
    counts: dict[str, Any] = {
        "prompts": len(work.prompts),
        "samples": sum(len(group.responses) for group in groups),
        "plain_rows": len(plain),  # the number of prompts with a correct response
        "prefixed_rows": len(rows) - len(plain),
    }
    if options.bands:
        counts["prompts_without_prefix"] = sum(not of_prompt for of_prompt in prefixes.values())
    replace_file(options.output, _json_lines(rows))
    if options.plain_output:
        replace_file(options.plain_output, _json_lines(plain))
    if options.demonstrations:
        whole = [row | {"response": traces[row["id"]].text, "trace": traces[row["id"]].origin} for row in plain]
        replace_file(options.demonstrations, _json_lines(whole))
    text = json.dumps(counts | ({"unused_traces": given.unused} if given.unused else {}), indent=2)
    replace_file(options.report, text + "\n")
    for name, number in counts.items():
        print(f"{number:8d} {name.replace('_', ' ')}")
    print(f"wrote {options.output}")


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
