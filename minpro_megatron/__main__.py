"""The command line. Modules are imported after parsing, so that each command imports only what it uses."""

import argparse
import importlib
import json
import signal
import sys
from pathlib import Path

from minpro_megatron.command_line import Parser

ROLES = {
    "serve": "start and watch the SGLang rollout servers",
    "collect": "issue prompts, collect and reward rollouts, feed the trainer",
    "train": "one rank of the trainer (started by torchrun)",
    "timer": "replace the trainer and only measure the servers (debug.trainer=timer)",
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m minpro_megatron", description="RL post-training under off-policy drift.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    launch = commands.add_parser("launch", help="run a recipe with all roles on this machine")
    launch.add_argument("recipe", metavar="RECIPE", help="module:function, such as recipes.demo:tiny_moe")
    launch.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    recipes = commands.add_parser("recipes", help="list the recipes that launch can run")
    recipes.add_argument(
        "module",
        nargs="?",
        default="recipes",
        metavar="MODULE",
        help="module or package with recipes (default: recipes)",
    )
    for role, purpose in ROLES.items():
        command = commands.add_parser(role, help=purpose)
        command.add_argument("--config", type=Path, required=True, help="the run's run.json")
        command.add_argument(
            "--incarnation", type=int, required=True, help="number of starts of the run before this one"
        )
        if role in ("serve", "collect"):
            command.add_argument(
                "--host", metavar="ADDRESS", help="address to listen on (default: the one in the settings)"
            )
        if role == "train":
            command.add_argument(
                "--save-by", type=float, metavar="TIME", help="Unix time by which the trainer must have saved and ended"
            )
        if role == "serve":
            command.add_argument(
                "--servers",
                type=_range,
                metavar="FIRST:END",
                help="indices of the servers of this machine (default: all)",
            )
    _add_node(
        commands.add_parser("node", help="run one node's share of a run on several nodes (started by a cluster's job)")
    )
    _add_export(commands.add_parser("export", help="write a policy version of a run as a Hugging Face folder"))
    _add_eval(commands.add_parser("eval", help="sample benchmarks and report accuracy, pass@k and maj@k"))
    return parser


def _add_node(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Runs this node's share of a run, as one process per node. The first node prepares the run folder, all nodes "
        "check themselves, and then the roles start."
    )
    command.add_argument("--config", type=Path, required=True, help="the run's settings, written by cluster.submit")
    command.add_argument("--topology", type=Path, required=True, help="shares of the nodes, written by cluster.submit")
    command.add_argument(
        "--start",
        metavar="NAME",
        help="name of this start, the same on all nodes and new for every start (default: Slurm's job)",
    )
    command.add_argument("--index", type=int, metavar="N", help="index of this node, from 0 (default: Slurm's)")
    command.add_argument("--interface", default="", metavar="NAME", help="network interface that connects the nodes")
    command.add_argument(
        "--end-early-s",
        type=float,
        default=0.0,
        metavar="X",
        help="seconds before the job's end at which SIGTERM arrives (default: 0)",
    )


def _add_export(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Writes the weights of a run's checkpoint, unchanged, as a Hugging Face folder with the config and the "
        "tokenizer of the run's initial model."
    )
    command.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder, such as runs/demo")
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a new folder, or that of an earlier export"
    )
    command.add_argument(
        "--version",
        metavar="best|last|N",
        help="the one with the highest evaluation score, the newest, or a policy version (default: best)",
    )
    command.add_argument("--verify", action="store_true", help="compare the result with the checkpoint, bit by bit")


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Accuracy, pass@k and maj@k of a model on benchmarks. The defaults are the protocol of arXiv:2601.22718. An "
        "interrupted evaluation resumes when the same command is run again."
    )
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
        type=_names,
        metavar="NAME,...",
        help="aime24, aime25, amc23, math500, olympiad, minerva, gsm8k, or other names with a --benchmark-file",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of <benchmark>.jsonl, made by tools/prepare_data.py (default: data)",
    )
    add("--benchmark-file", type=_named_path, action="append", dest="benchmark_files", metavar="NAME=PATH")
    add("--num-prompts", type=_count, metavar="N", help="use only the first N prompts of each benchmark (default: all)")
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
        type=_count,
        metavar="N",
        help="maximum length of a response in tokens (default: 20480)",
    )
    add("--max-prompt-tokens", type=_count, metavar="N", help="maximum length of a prompt in tokens (default: 2048)")
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
    add("--extra-stop-tokens", type=_names, metavar="TOKEN,...", help="special tokens that also end a response")
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
    add("--reward-workers", type=_count, metavar="N", help="number of grading processes (default: 1)")
    add(
        "--reward-timeout-s",
        type=float,
        metavar="X",
        help="limit in seconds of processor time for grading one response (default: 5)",
    )
    add = command.add_argument_group("servers").add_argument
    add("--urls", type=_names, metavar="URL,...", help="addresses of external servers; no servers are started")
    add("--api-key-variable", metavar="NAME", help="environment variable with the servers' API key")
    add("--engine", choices=["sglang", "reference"], help="server program (default: sglang)")
    add("--device", choices=["cpu", "cuda"], help="device of the servers (default: cuda if there is a GPU)")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="data type of the weights (default: float32 on the CPU, else bfloat16)",
    )
    add("--servers", type=_count, metavar="N", help="number of servers to start (default: 1)")
    add("--tensor-parallel", type=_count, metavar="N", help="GPUs per server (default: 1)")
    add(
        "--max-running-requests",
        type=_count,
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


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _range(text: str) -> range:
    first, separator, end = text.partition(":")
    if not (separator and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:END, such as 4:8")
    return range(int(first), int(end))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected distinct names, separated by commas")
    return names


def _named_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PATH")
    return name, Path(path)


def _samples(text: str) -> dict[str, int]:
    """Samples per prompt by benchmark; the entry "" is for all benchmarks without their own."""
    parts = [part.rpartition("=") for part in text.split(",")]
    found = {name.strip(): _count(number) for name, _, number in parts}
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


def _run_eval(given: dict[str, object]) -> int:
    from minpro_megatron.files.disk_space import naming_full_disk
    from minpro_megatron.launch.evaluation import evaluate
    from minpro_megatron.launch.evaluation_options import EvaluationOptions

    chosen = {name: value for name, value in given.items() if value is not None and name != "command"}
    chosen["benchmark_files"] = dict(chosen.get("benchmark_files", []))  # type: ignore[call-overload]
    evaluation = EvaluationOptions(**chosen)  # type: ignore[arg-type]
    with naming_full_disk(evaluation.output, f"--output {evaluation.output}", "give another --output"):
        return evaluate(evaluation)


def _run_export(given: dict[str, object]) -> int:
    from minpro_megatron.launch.export import ExportOptions, export

    chosen = {name: value for name, value in given.items() if value is not None and name != "command"}
    return export(ExportOptions(**chosen))  # type: ignore[arg-type]


def _list_recipes(module: str) -> int:
    from minpro_megatron.launch.recipe import list_recipes

    print("\n".join(list_recipes(module)))
    return 0


def _run_role(options: argparse.Namespace) -> int:
    from minpro_megatron.launch.prctl import end_with_parent

    role = options.command
    # A rank may hang in a collective, where it could not handle SIGTERM; it has nothing to clean up.
    end_with_parent(signal.SIGKILL if role == "train" else signal.SIGTERM)
    from minpro_megatron.launch.recipe import read_config

    config = read_config(options.config)
    if host := getattr(options, "host", None):
        section = {"serve": "server", "collect": "collector"}[role]
        changed = getattr(config, section).model_copy(update={"host": host})
        config = config.model_copy(update={section: changed})
    run = importlib.import_module(f"minpro_megatron.roles.{role}").run
    own = {"serve": ("servers",), "train": ("save_by",)}.get(role, ())
    from minpro_megatron.files.disk_space import naming_full_disk

    with naming_full_disk(config.run_dir, f"runs_dir = {config.runs_dir}", "choose another runs_dir=..."):
        return run(config, options.incarnation, *(getattr(options, name) for name in own))


def _run_node(options: argparse.Namespace) -> int:
    from minpro_megatron.launch.node import NodeOptions, run_node

    given = {name: value for name, value in vars(options).items() if name != "command"}
    return run_node(NodeOptions(**given))


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from minpro_megatron.errors import run_reporting

    return run_reporting(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.command in ROLES:
        return _run_role(options)
    if options.command == "node":
        return _run_node(options)
    if options.command == "export":
        return _run_export(vars(options))
    if options.command == "eval":
        return _run_eval(vars(options))
    if options.command == "recipes":
        return _list_recipes(options.module)
    from minpro_megatron.launch.launcher import launch

    return launch(options.recipe, options.overrides)


if __name__ == "__main__":
    sys.exit(main())
