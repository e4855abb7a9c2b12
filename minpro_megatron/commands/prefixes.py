"""Make the training prompts of PrefixRL (arXiv:2601.18795): hard prompts, with prefixes of correct responses to them.

    minpro prefixes --model HF_DIR --prompts hard.jsonl --output hard_with_prefixes.jsonl

A base model samples each prompt until one response is correct (rejection sampling), at most --max-samples times. Such
a trace is cut at --prefixes positions, drawn uniformly between --shortest and --longest of its tokens. The part before
a cut becomes the row's `prefix`: context that a run's responses continue, without loss. The prompts without prefix are
rows too, so three prefixes per problem make prefixed and plain prompts 3:1. Prompts without a correct response are
excluded, and counted in FILE.report.json.

Samples are kept in --samples-folder: the same command resumes after an interruption, and with other cuts samples
nothing again. The servers are started by this command, or are external ones given with --urls.

The options of servers, sampling and grading are those of `minpro eval`, which are settings of a run.
"""

import argparse
from pathlib import Path

from minpro_megatron.command_line import command_parser, count, share
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
    for title, group in OWN_PROMPTS_OPTIONS.items():
        container = parser.add_argument_group(title)
        for option in group:
            option.add_to(container)
    options = parser.parse_args(arguments)
    if options.shortest > options.longest:
        parser.error(f"--shortest {options.shortest:g} exceeds --longest {options.longest:g}: lower it")
    return options


def main(arguments: list[str] | None = None, prog: str = "minpro prefixes") -> int:
    """0 on success, 1 if sampling failed, 2 after a message about an error in the input."""
    given = vars(parse_arguments(arguments, prog))

    def run() -> int:
        from minpro_megatron.launch.prefix_prompts import PrefixOptions, make_prefixes  # the parts of an evaluation

        with naming_flags():
            return make_prefixes(PrefixOptions(**without_settings(given), settings=own_prompts_settings(given)))

    return run_reporting(run, reads_given_files=True)
