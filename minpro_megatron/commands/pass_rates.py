"""Measure how often a model solves each prompt of a file, and write the pass rates into the file's rows.

    minpro pass-rates --model HF_DIR --prompts train.jsonl --output train_measured.jsonl --samples 128 \\
        --selected hard.jsonl --max-pass-rate 0.05

Each prompt is sampled --samples times. The output has all rows of the prompt file in their order, with the fields
`pass_rate`, the share of correct responses, and `measured`: the model, and the numbers of samples and of correct ones.
All other fields keep their bytes. It may be the prompt file itself; no other file may be one that is given or written.
With --selected, the rows whose pass rate is between the bounds are also written to a file of their own; without it, a
run selects by data.min_pass_rate and data.max_pass_rate. pass@k over the prompts, with 95 % intervals, is printed, and
is in OUTPUT's name with .pass_rates.json.

A prompt's `prefix` is given to the model, so the pass rates of prefixed prompts are measured too (PrefixRL,
arXiv:2601.18795). A response that cannot be graded counts as wrong.

Samples are kept in --samples-folder: after an interruption the same command resumes, and with other bounds it samples
nothing again. The servers are started by this command, or are external ones given with --urls.

The options of servers, sampling and grading are those of `minpro eval`, which are settings of a run.
"""

import argparse
from pathlib import Path

from minpro_megatron.command_line import command_parser, count
from minpro_megatron.errors import run_reporting
from minpro_megatron.launch.evaluation_options import (
    OWN_PROMPTS_OPTIONS,
    naming_flags,
    own_prompts_settings,
    without_settings,
)


def parse_arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    add = parser.add_argument
    add("--model", required=True, metavar="HF_DIR", help="the model that samples, such as the base model of a run")
    add("--prompts", required=True, type=Path, metavar="FILE.jsonl", help="the prompt file")
    add("--output", required=True, type=Path, metavar="FILE.jsonl", help="the same rows with their pass rates")
    add("--samples", type=count, default=32, metavar="N", help="samples per prompt (default: 32)")
    add("--samples-folder", type=Path, metavar="DIR", help="folder of the samples (output's name with .pass_rates)")
    add = parser.add_argument_group("selection").add_argument
    add("--selected", type=Path, metavar="FILE.jsonl", help="the rows whose pass rate is between the bounds")
    add("--min-pass-rate", type=_rate, default=0.0, metavar="X", help="rows with less are not selected (default: 0)")
    add("--max-pass-rate", type=_rate, default=1.0, metavar="X", help="rows with more are not selected (default: 1)")
    for title, group in OWN_PROMPTS_OPTIONS.items():
        container = parser.add_argument_group(title)
        for option in group:
            option.add_to(container)
    options = parser.parse_args(arguments)
    if options.min_pass_rate > options.max_pass_rate:
        parser.error(
            f"--min-pass-rate {options.min_pass_rate:g} exceeds --max-pass-rate {options.max_pass_rate:g}: lower it"
        )
    if options.selected is None and (options.min_pass_rate > 0 or options.max_pass_rate < 1):
        parser.error("--min-pass-rate and --max-pass-rate select rows for --selected FILE.jsonl: give it too")
    return options


def _rate(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def main(arguments: list[str] | None = None, prog: str = "minpro pass-rates") -> int:
    """0 on success, 1 if sampling failed, 143 if terminated, 2 after a message about an error in the input."""
    given = vars(parse_arguments(arguments, prog))

    def run() -> int:
        from minpro_megatron.launch.pass_rates import PassRateOptions, measure_pass_rates  # the parts of an evaluation

        with naming_flags():
            return measure_pass_rates(PassRateOptions(**without_settings(given), settings=own_prompts_settings(given)))

    return run_reporting(run, reads_given_files=True)
