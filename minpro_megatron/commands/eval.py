"""The command `eval`: accuracy, pass@k and maj@k of a model on benchmarks."""

import argparse
from pathlib import Path
from typing import Any

from minpro_megatron.command_line import Parser, count, names
from minpro_megatron.errors import run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro eval") -> int:
    """0 done, 1 failed, 143 terminated, 2 after a message about a wrong option or input."""
    from minpro_megatron.launch.evaluation_options import SETTING_OPTIONS

    parser = Parser(
        prog=prog,
        description="Accuracy, pass@k and maj@k of a model on benchmarks. The defaults are the protocol of "
        "arXiv:2601.22718, or with --run the wording, the limits and the reward of a run. An interrupted evaluation "
        "resumes when the same command is run again.",
    )
    _add_own_options(parser)
    for title, options in SETTING_OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            option.add_to(group)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    for name in ("model", "benchmarks"):
        if name not in given and "run" not in given:
            parser.error(f"the following arguments are required: --{name}, or --run")
    return run_reporting(lambda: _evaluate(given))


def _evaluate(given: dict[str, Any]) -> int:
    from minpro_megatron.config.options import given_settings
    from minpro_megatron.files.disk_space import naming_full_disk
    from minpro_megatron.launch.evaluation import evaluate
    from minpro_megatron.launch.evaluation_options import ALL_OPTIONS, EvaluationOptions, naming_flags, of_run
    from minpro_megatron.launch.recipe import read_config

    settings = {option.destination for option in ALL_OPTIONS}
    own: dict[str, Any] = {name: value for name, value in given.items() if name not in settings}
    own["benchmark_files"] = dict(own.get("benchmark_files", []))
    own["settings"] = given_settings(ALL_OPTIONS, given)
    if (run := own.pop("run", None)) is not None:
        own = of_run(read_config(run / "run.json", "--run"), own)
    options = EvaluationOptions(**own)
    with naming_flags(), naming_full_disk(options.output, f"--output {options.output}", "give another --output"):
        return evaluate(options)


def _add_own_options(parser: Parser) -> None:
    add = parser.add_argument_group("model and benchmarks").add_argument
    add(
        "--model",
        metavar="HF_DIR",
        help="folder of config.json, tokenizer and weights, a run's checkpoint, or a hub id (default with --run: the "
        "run's hf_export)",
    )
    add(
        "--run",
        type=Path,
        metavar="DIR",
        help="a run's folder: its run.json gives the wording (instruction, chat template, stop tokens), the limits of "
        "tokens, temperature and top-p of its evaluations, and the reward, unless they are given here",
    )
    add(
        "--benchmarks",
        type=names,
        metavar="NAME,...",
        help="aime24, aime25, amc23, math500, olympiad, minerva, gsm8k, or other names with a --benchmark-file "
        "(default with --run: heldout, which is its data.heldout_file, and its evaluation.benchmarks)",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of <benchmark>.jsonl, made by `minpro prepare` (default: data)",
    )
    add(
        "--benchmark-file",
        type=_named_path,
        action="append",
        dest="benchmark_files",
        metavar="NAME=PATH",
        help="the prompt file of a benchmark that is not in the folder --data; may be repeated",
    )
    add("--num-prompts", type=count, metavar="N", help="use only the first N prompts of each benchmark (default: all)")
    add("--output", required=True, type=Path, metavar="DIR", help="a new folder, or the output of the same command")
    add(
        "--compare", type=Path, nargs="+", metavar="DIR", help="outputs of other evaluations to show in the same tables"
    )
    add(
        "--samples",
        type=_samples,
        metavar="N|NAME=N,...",
        help="samples per prompt, for all benchmarks or by name (default: 128 for amc23, aime24 and aime25, else 2; "
        "with --run: the run's)",
    )


def _named_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PATH")
    return name, Path(path)


def _samples(text: str) -> dict[str, int]:
    """Samples per prompt by benchmark; the entry "" is for all benchmarks without their own."""
    parts = [part.rpartition("=") for part in text.split(",")]
    found = {name.strip(): count(number) for name, _, number in parts}
    if len(found) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: name every benchmark only once")
    return found
