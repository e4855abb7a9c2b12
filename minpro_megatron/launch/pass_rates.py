"""The work of the command `pass-rates`: samples each prompt of a file and writes the measured pass rates into it."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.samples import SampledGroup, SampleFile
from minpro_megatron.evaluation.scores import BenchmarkScores, answers_of, powers_of_two, score_benchmark
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.launch.evaluation import sample_missing
from minpro_megatron.launch.evaluation_options import wording
from minpro_megatron.launch.evaluation_prompts import sampling_settings
from minpro_megatron.launch.own_prompts import PROMPTS, check_written_files, read_own_prompts
from minpro_megatron.prompt_sets.pass_rates import Measured, rows_with_pass_rates
from minpro_megatron.prompts.prompts import read_lines
from minpro_megatron.roles.evaluate import plan


@dataclass(frozen=True, kw_only=True)
class PassRateOptions:
    """The options of the command line. `settings`: by `section.key`, those of the servers, sampling and grading."""

    model: str
    prompts: Path
    output: Path
    samples: int
    samples_folder: Path | None
    selected: Path | None
    min_pass_rate: float
    max_pass_rate: float
    settings: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.samples_folder or self.output.with_suffix(".pass_rates")

    @property
    def report(self) -> Path:
        """Not .report.json: that of `minpro prepare` stands beside the prompt file, which may be the output."""
        return self.output.with_suffix(".pass_rates.json")

    def selects(self, found: Measured) -> bool:
        return self.min_pass_rate <= found.pass_rate <= self.max_pass_rate


def measure_pass_rates(options: PassRateOptions) -> int:
    """Samples what is missing, and writes the files. Returns the exit status. Raises UserError for errors in the
    input."""
    check_written_files(
        {"--prompts": [options.prompts]},
        {"--output": options.output, "--selected": options.selected, "the report of --output": options.report},
        rewritten=[("--output", "--prompts")],
    )
    lines = read_lines(options.prompts, "--prompts")  # now, so that a change meanwhile mixes no two files
    samples = {PROMPTS: options.samples}
    own = read_own_prompts(options.model, options.prompts, samples, options.folder, options.settings)
    config = own.config
    with SampleFile(options.folder, sampling_settings(own.asked, config, own.by_name)) as file:
        print(wording(own.asked, config), flush=True)
        groups = list(file.groups(lambda response: ""))
        tasks = plan(own.by_name, samples, config.seed, [group.key for group in groups])
        if tasks:
            wanted = {PROMPTS: options.samples * len(own.tokenized)}
            if status := sample_missing(config, file, tasks, groups, wanted):
                return status
            groups = list(file.groups(lambda response: ""))
    _write(options, lines, config, groups)
    return 0


def _write(options: PassRateOptions, lines: Sequence[bytes], config: RunConfig, groups: Sequence[SampledGroup]) -> None:
    try:
        answers = answers_of(PROMPTS, groups, options.samples, config.reward.right_reward)
    except ValueError as error:
        raise UserError(f"{error}; correct the grader or the answers, and give another --samples-folder") from None
    ids = sorted({group.prompt_id for group in groups})  # the order of the answers
    counts = answers.is_right.sum(axis=1).tolist()
    measured = {one: Measured(options.model, options.samples, right) for one, right in zip(ids, counts, strict=True)}
    rows = rows_with_pass_rates(lines, measured)
    chosen = rows_with_pass_rates(lines, measured, options.selects)
    if options.selected and not chosen:
        raise UserError(
            f"--min-pass-rate {options.min_pass_rate:g}, --max-pass-rate {options.max_pass_rate:g}: no prompt is left "
            f"for --selected; pass rates are from {min(counts) / options.samples:g} to "
            f"{max(counts) / options.samples:g}, so widen the bounds"
        )
    replace_file(options.output, _text(rows))
    if options.selected:
        replace_file(options.selected, _text(chosen))
    _report(options, score_benchmark(PROMPTS, answers, config.seed), counts, len(chosen))


def _report(options: PassRateOptions, scores: BenchmarkScores, counts: Sequence[int], num_selected: int) -> None:
    """Prints pass@k over the prompts and writes it beside the output."""
    ks = powers_of_two(options.samples)
    report = {
        "model": options.model,
        "prompts": scores.num_prompts,
        "samples_per_prompt": options.samples,
        "pass_at_k": {k: scores.pass_at_k[k].value for k in ks},
        "never_right": sum(right == 0 for right in counts),
        "always_right": sum(right == options.samples for right in counts),
        "truncated_fraction": scores.truncated_fraction,
        "ungraded_responses": scores.ungraded_responses,
    }
    if options.selected:
        report["selected"] = num_selected
        print(f"wrote {num_selected} of {scores.num_prompts} prompts to {options.selected}")
    replace_file(options.report, json.dumps(report, indent=2) + "\n")
    for k in ks:
        found = scores.pass_at_k[k]
        print(f"pass@{k:<4d} {found.value:.4f}  ({found.low:.4f} to {found.high:.4f})")
    print(f"{report['never_right']} of {scores.num_prompts} prompts never right, {report['always_right']} always")
    if scores.ungraded_responses:
        print(f"{scores.ungraded_responses} responses could not be graded and count as wrong", file=sys.stderr)
    print(f"wrote {options.output}")


def _text(rows: Sequence[str]) -> str:
    return "".join(f"{row}\n" for row in rows)
