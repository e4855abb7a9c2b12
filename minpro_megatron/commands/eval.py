"""The command `eval`: accuracy, pass@k and maj@k of a model on benchmarks."""

import argparse
import json
from pathlib import Path

from minpro_megatron.command_line import Parser, count, names
from minpro_megatron.errors import run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro eval") -> int:
    """0 done, 1 failed, 143 terminated, 2 after a message about a wrong option or input."""
    parser = Parser(
        prog=prog,
        description="Accuracy, pass@k and maj@k of a model on benchmarks. The defaults are the protocol of "
        "arXiv:2601.22718. An interrupted evaluation resumes when the same command is run again.",
    )
    _add_options(parser)
    given = vars(parser.parse_args(arguments))
    return run_reporting(lambda: _evaluate(given))


def _evaluate(given: dict[str, object]) -> int:
    from minpro_megatron.files.disk_space import naming_full_disk
    from minpro_megatron.launch.evaluation import evaluate
    from minpro_megatron.launch.evaluation_options import EvaluationOptions

    chosen = {name: value for name, value in given.items() if value is not None}
    chosen["benchmark_files"] = dict(chosen.get("benchmark_files", []))  # type: ignore[call-overload]
    evaluation = EvaluationOptions(**chosen)  # type: ignore[arg-type]
    with naming_full_disk(evaluation.output, f"--output {evaluation.output}", "give another --output"):
        return evaluate(evaluation)


def _add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("model and benchmarks").add_argument
    add(
        "--model",
        required=True,
        metavar="HF_DIR",
        help="folder of config.json, tokenizer and weights, a run's checkpoint, or a hub id",
    )
    add(
        "--benchmarks",
        required=True,
        type=names,
        metavar="NAME,...",
        help="aime24, aime25, amc23, math500, olympiad, minerva, gsm8k, or other names with a --benchmark-file",
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
    add = command.add_argument_group("sampling").add_argument
    add(
        "--samples",
        type=_samples,
        metavar="N|NAME=N,...",
        help="samples per prompt, for all benchmarks or by name (default: 128 for amc23, aime24 and aime25, else 2)",
    )
    add("--temperature", type=float, metavar="X", help="sampling temperature (default: 1.0)")
    add("--top-p", type=float, metavar="X", help="top-p of the sampling (default: 0.7)")
    add(
        "--max-response-tokens",
        type=count,
        metavar="N",
        help="maximum length of a response in tokens (default: 20480)",
    )
    add("--max-prompt-tokens", type=count, metavar="N", help="maximum length of a prompt in tokens (default: 2048)")
    add("--instruction", metavar="TEXT", help="none, dapo, boxed, or a text that contains {question} (default: dapo)")
    add(
        "--chat-template",
        action="store_true",
        default=None,
        help="present the question as the user's turn in the chat template",
    )
    add(
        "--chat-template-arguments",
        type=_json_object,
        metavar="JSON",
        help='variables of the chat template, such as {"enable_thinking": false}',
    )
    add("--extra-stop-tokens", type=names, metavar="TOKEN,...", help="special tokens that also end a response")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="seed of sampling, if the engine supports it, and of bootstrap resampling (default: 0)",
    )
    add = command.add_argument_group("grading").add_argument
    add(
        "--reward",
        metavar="NAME",
        help="math, dapo, dapo_boxed, calculator, or package.module:function (default: math)",
    )
    add(
        "--right-reward",
        type=float,
        metavar="X",
        help="a response with at least this reward counts as correct (default: 1)",
    )
    add("--reward-workers", type=count, metavar="N", help="number of grading processes (default: 1)")
    add(
        "--reward-timeout-s",
        type=float,
        metavar="X",
        help="limit in seconds of processor time for grading one response (default: 5)",
    )
    add = command.add_argument_group("servers").add_argument
    add("--urls", type=names, metavar="URL,...", help="addresses of external servers; no servers are started")
    add("--api-key-variable", metavar="NAME", help="environment variable with the servers' API key")
    add("--engine", choices=["sglang", "reference"], help="server program (default: sglang)")
    add("--device", choices=["cpu", "cuda"], help="device of the servers (default: cuda if there is a GPU)")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="data type of the weights (default: float32 on the CPU, else bfloat16)",
    )
    add("--servers", type=count, metavar="N", help="number of servers to start (default: 1)")
    add("--tensor-parallel", type=count, metavar="N", help="GPUs per server (default: 1)")
    add(
        "--max-running-requests",
        type=count,
        metavar="N",
        help="maximum number of concurrent requests per server (default: 256)",
    )
    add("--start-timeout-s", type=float, metavar="X", help="seconds for a server to start or respond (default: 900)")
    add(
        "--request-timeout-s",
        type=float,
        metavar="X",
        help="seconds for the complete response to a request (default: 7200)",
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


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: not a JSON object")
    return value
