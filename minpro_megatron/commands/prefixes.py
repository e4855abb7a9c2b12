"""Make the training prompts of PrefixRL (arXiv:2601.18795): hard prompts, with prefixes of correct responses to them.

    minpro prefixes --model HF_DIR --prompts hard.jsonl --output hard_with_prefixes.jsonl

Each prompt needs one correct response, its trace. By default the base model samples each prompt until one response is
correct (rejection sampling), at most --max-samples times. --runs takes the correct responses in the journals of
earlier runs, of any policy version and of any model; a prefixed prompt's response counts together with its prefix.
--texts takes responses of a file, such as those of another family of models: rows {"id", "response"} and optionally
"model", of which only those are used that the reward calls correct. Several sources are used in this order; next to
--runs or --texts nothing is sampled unless --max-samples is given.

A trace is cut at --prefixes places, drawn uniformly between --shortest and --longest of its tokens. The part before a
cut becomes the row's `prefix`: context that a run's responses continue, without loss. The prompts without prefix are
rows too, so three prefixes per problem make prefixed and plain prompts 3:1. Prompts without a correct response are
excluded, and counted in the output's name with .report.json.

With --bands, the places are chosen by the accuracy that the base model has behind them: for each band of accuracies,
such as 0.2:0.4, a bisection measures places with --cut-samples responses each until one is in the band. The measured
accuracy becomes the row's `pass_rate`, so that data.curriculum=easy_first trains on long prefixes first. A trace has no
prefix for a band that none of its measured places is in.

Samples are kept in --samples-folder: the same command resumes after an interruption, and with other cuts, a larger
--max-samples or other sources it samples nothing again that it has. Episodes (--environment) are no traces.
The servers are started by this command, or are external ones given with --urls.

The options of servers, sampling and grading are those of `minpro eval`, which are settings of a run.
"""

import argparse
from pathlib import Path

from minpro_megatron.command_line import command_parser, count, share, whole_number
from minpro_megatron.errors import run_reporting
from minpro_megatron.launch.evaluation_options import (
    OWN_PROMPTS_OPTIONS,
    naming_flags,
    own_prompts_settings,
    without_settings,
)
from minpro_megatron.prompt_sets.cut_search import Band


def parse_arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    add = parser.add_argument
    add("--model", required=True, metavar="HF_DIR", help="the base model that samples")
    add("--prompts", required=True, type=Path, metavar="FILE.jsonl", help="hard prompts, without prefixes")
    add("--output", required=True, type=Path, metavar="FILE.jsonl", help="data.train_file of a run")
    add("--plain-output", type=Path, metavar="FILE.jsonl", help="only their plain rows, for a run to compare with")
    add("--demonstrations", type=Path, metavar="FILE.jsonl", help="their whole traces, as data.demonstrations of a run")
    add("--samples-folder", type=Path, metavar="DIR", help="folder of the samples (the output's name with .samples)")
    add = parser.add_argument_group("correct responses").add_argument
    add("--runs", type=Path, nargs="+", default=[], metavar="DIR", help="folders of earlier runs, or their journals")
    add("--texts", type=Path, nargs="+", default=[], metavar="FILE.jsonl", help="files of responses to the prompts")
    add(
        "--max-samples",
        type=whole_number,
        metavar="N",
        help="samples per prompt at most (default: 128; 0 with --runs or --texts)",
    )
    add = parser.add_argument_group("cuts").add_argument
    add("--prefixes", type=count, metavar="N", help="number of prefixes per problem (default: 3)")
    add("--shortest", type=share, default=0.4, metavar="X", help="least share of a trace's tokens (default: 0.4)")
    add("--longest", type=share, default=0.8, metavar="X", help="largest share of a trace's tokens (default: 0.8)")
    add(
        "--bands",
        type=_bands,
        default=[],
        metavar="LOW:HIGH,...",
        help="wanted accuracies, a prefix for each, in place of --prefixes",
    )
    add("--cut-samples", type=count, default=16, metavar="N", help="samples per measured place (default: 16)")
    for title, group in OWN_PROMPTS_OPTIONS.items():
        container = parser.add_argument_group(title)
        for option in group:
            option.add_to(container)
    options = parser.parse_args(arguments)
    if options.shortest > options.longest:
        parser.error(f"--shortest {options.shortest:g} exceeds --longest {options.longest:g}: lower it")
    if options.bands and options.prefixes is not None:
        parser.error("--bands gives a prefix for each band, --prefixes their number at random places: give one of them")
    if options.max_samples == 0 and not (options.runs or options.texts):
        parser.error("--max-samples 0: there are no correct responses then; give --runs or --texts, or raise it")
    options.prefixes = options.prefixes or 3
    return options


def _bands(text: str) -> list[Band]:
    """LOW:HIGH, or several of them, separated by commas."""
    found = []
    for part in text.split(","):
        low, _, high = part.partition(":")
        try:
            band = Band(float(low), float(high))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r}: expected LOW:HIGH, such as 0.2:0.4") from None
        if not 0 <= band.low <= band.high <= 1:
            raise argparse.ArgumentTypeError(f"{part!r}: expected 0 <= LOW <= HIGH <= 1, such as 0.2:0.4")
        found.append(band)
    return found


def main(arguments: list[str] | None = None, prog: str = "minpro prefixes") -> int:
    """0 on success, 1 if sampling failed, 2 after a message about an error in the input."""
    given = vars(parse_arguments(arguments, prog))

    def run() -> int:
        from minpro_megatron.launch.prefix_prompts import PrefixOptions, make_prefixes  # the parts of an evaluation

        with naming_flags():
            return make_prefixes(PrefixOptions(**without_settings(given), settings=own_prompts_settings(given)))

    return run_reporting(run, reads_given_files=True)
