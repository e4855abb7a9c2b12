"""Make prompt sets (JSON Lines of id, source, prompt, answer; pass_rate, prefix, system, metadata if known).

    minpro prepare dapo --input BytedTsinghua-SIA/DAPO-Math-17k --output data/dapo.jsonl
    minpro prepare gsm8k --input openai/gsm8k:main/test-*.parquet --output data/gsm8k.jsonl
    minpro prepare custom --input FILE.parquet --prompt-column question --answer-column answer \\
        --output data/mine.jsonl
    minpro prepare calculator --input GSM8K_TRAIN.jsonl --output recipes/data

--input is a file (parquet, JSON Lines, a JSON array of objects or CSV; text also compressed with gzip, bzip2 or xz), a
folder of them, or a data set of the Hugging Face hub (owner/name, or owner/name:PATTERN if it has several files). Files
are streamed, except a JSON array. `prompt` is only the question: the run's setting data.instruction wraps it, and known
instructions of other frameworks are removed. Answers are extracted from boxes, dollar signs, lists of one and solutions
that end with ####. A repeated question is written once; a question with different answers is excluded.
FILE.report.json next to FILE.jsonl lists what was dropped and why, and which answers the grader (--reward) does not
accept even as their own response. A damaged row ends the command with its file, row and field, and nothing is
written.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from minpro_megatron.command_line import command_parser
from minpro_megatron.errors import UserError, run_reporting
from minpro_megatron.prompt_sets import calculator, data_files
from minpro_megatron.prompt_sets.assemble import assemble
from minpro_megatron.prompt_sets.custom import CustomSet
from minpro_megatron.prompt_sets.mathematics import SETS, MathSet
from minpro_megatron.rewards.registry import REWARDS


def parse_arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SET")
    for name, made in SETS.items():
        command = commands.add_parser(name, help=made.about.partition(":")[0], description=made.about)
        _add_files(command)
        command.set_defaults(prepare=_prepare_known)
    _add_custom(commands.add_parser("custom", help="any file, by the names of its columns", description=_CUSTOM))
    command = commands.add_parser("calculator", help="two-operand expressions from GSM8K's solutions")
    command.add_argument("--input", type=Path, required=True, help="GSM8K's train.jsonl")
    command.add_argument("--output", type=Path, required=True, help="folder for the two prompt files")
    command.set_defaults(prepare=lambda options: calculator.prepare(options.input, options.output))
    return parser.parse_args(arguments)


_CUSTOM = (
    "Any parquet, JSON Lines, JSON or CSV file. The question is a text or a chat of one user's turn, which may begin "
    "with a system message (for runs with data.chat_template); the answer is a text, a number, or a list of them "
    "(--answer-list). COLUMN may refer into an object: reward_model.ground_truth."
)


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument("--input", required=True, metavar="FILE|HUB_ID", help="file, folder or owner/name[:PATTERN]")
    command.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help="the prompt file to write")
    command.add_argument("--revision", help="branch, tag or commit of the hub's data set")
    command.add_argument(
        "--answer-list",
        choices=["all", "any"],
        help="for an answer that is a list of several: all of them are required, or any one of them is correct "
        "(olympiad: all, unless given; other sets: such a row is refused, unless the answers are equal)",
    )
    command.add_argument(
        "--reward",
        default="math",
        metavar="NAME",
        help=f"the run's grader ({', '.join(REWARDS)}, or package.module:function): answers that it does not accept as "
        "their own response are reported (math, unless given)",
    )


def _add_custom(command: argparse.ArgumentParser) -> None:
    _add_files(command)
    command.add_argument("--prompt-column", required=True, metavar="COLUMN", help="the question")
    command.add_argument("--answer-column", required=True, metavar="COLUMN", help="its final answer, not a solution")
    command.add_argument("--pass-rate-column", default="", metavar="COLUMN", help="share of correct responses, 0 to 1")
    command.add_argument("--prefix-column", default="", metavar="COLUMN", help="a given prefix of the response")
    command.add_argument("--source", help="the rows' source; the output's name unless given")
    command.add_argument(
        "--metadata",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the other columns of each row as its field `metadata` (default: they are kept)",
    )
    command.set_defaults(prepare=_prepare_custom)


def _prepare_known(options: argparse.Namespace) -> list[str]:
    made = SETS[options.command]
    return _assemble(options, made.source, made)


def _prepare_custom(options: argparse.Namespace) -> list[str]:
    made = CustomSet(
        options.prompt_column,
        options.answer_column,
        options.pass_rate_column,
        options.prefix_column,
        keeps_metadata=options.metadata,
    )
    return _assemble(options, options.source or options.output.stem, made)


def _assemble(options: argparse.Namespace, source: str, made: CustomSet | MathSet) -> list[str]:
    if options.output.suffix != ".jsonl":
        raise UserError(f"--output {options.output}: must be the name of a .jsonl file")
    if options.answer_list:
        made = replace(made, answer_lists=options.answer_list)
    inputs = data_files.find_files(options.input, options.revision)
    return assemble(source, inputs, made.columns, made.convert, options.output, options.reward)


def main(arguments: list[str] | None = None, prog: str = "minpro prepare") -> int:
    """0 on success, 2 after a message about damaged or missing input."""
    options = parse_arguments(arguments, prog)

    def prepare() -> int:
        print("\n".join(options.prepare(options)))
        return 0

    return run_reporting(prepare, reads_given_files=True)
