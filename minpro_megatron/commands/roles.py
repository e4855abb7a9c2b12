"""The roles of a run as commands: the launcher and a cluster's job start them."""

import argparse
import importlib
import signal
from pathlib import Path

from minpro_megatron.command_line import Parser
from minpro_megatron.errors import run_reporting


def serve(arguments: list[str], prog: str) -> int:
    parser = _parser(prog)
    _add_host(parser)
    parser.add_argument(
        "--servers",
        type=_range,
        metavar="FIRST:END",
        help="indices of the servers of this machine (default: all)",
    )
    return _run("serve", parser.parse_args(arguments), "servers", section="server")


def collect(arguments: list[str], prog: str) -> int:
    parser = _parser(prog)
    _add_host(parser)
    return _run("collect", parser.parse_args(arguments), section="collector")


def train(arguments: list[str], prog: str) -> int:
    parser = _parser(prog)
    parser.add_argument(
        "--save-by", type=float, metavar="TIME", help="Unix time by which the trainer must have saved and ended"
    )
    return _run("train", parser.parse_args(arguments), "save_by")


def timer(arguments: list[str], prog: str) -> int:
    return _run("timer", _parser(prog).parse_args(arguments))


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="One role of a run, started by `launch` or by a cluster's job.")
    parser.add_argument("--config", type=Path, required=True, help="the run's run.json")
    parser.add_argument("--incarnation", type=int, required=True, help="number of starts of the run before this one")
    return parser


def _add_host(parser: Parser) -> None:
    parser.add_argument("--host", metavar="ADDRESS", help="address to listen on (default: the one in the settings)")


def _range(text: str) -> range:
    first, separator, end = text.partition(":")
    if not (separator and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:END, such as 4:8")
    return range(int(first), int(end))


def _run(role: str, options: argparse.Namespace, *own: str, section: str = "") -> int:
    """Runs the role with its own options. `section` has the setting that --host replaces."""
    return run_reporting(lambda: _run_role(role, options, own, section))


def _run_role(role: str, options: argparse.Namespace, own: tuple[str, ...], section: str) -> int:
    from minpro_megatron.launch.prctl import end_with_parent

    # A rank may hang in a collective, where it could not handle SIGTERM; it has nothing to clean up.
    end_with_parent(signal.SIGKILL if role == "train" else signal.SIGTERM)
    from minpro_megatron.files.disk_space import naming_full_disk
    from minpro_megatron.launch.recipe import read_config

    config = read_config(options.config)
    if section and options.host:
        changed = getattr(config, section).model_copy(update={"host": options.host})
        config = config.model_copy(update={section: changed})
    run = importlib.import_module(f"minpro_megatron.roles.{role}").run
    with naming_full_disk(config.run_dir, f"runs_dir = {config.runs_dir}", "choose another runs_dir=..."):
        return run(config, options.incarnation, *(getattr(options, name) for name in own))
