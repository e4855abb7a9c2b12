"""The command line. It parses, then imports: a role pays only for what it uses, and --help for nothing."""

import argparse
import importlib
import signal
import sys
from pathlib import Path
from typing import NoReturn

ROLES = {
    "serve": "start and watch the SGLang rollout servers",
    "collect": "issue prompts, collect and reward rollouts, feed the trainer",
    "train": "one rank of the trainer (started by torchrun)",
    "timer": "take the trainer's place and only measure the servers (debug.trainer=timer)",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m minpro_megatron", description="RL post-training under off-policy drift.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    launch = commands.add_parser("launch", help="run a recipe on this machine, all roles")
    launch.add_argument("recipe", metavar="RECIPE", help="module:function, such as recipes.demo:tiny_moe")
    launch.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    for role, purpose in ROLES.items():
        command = commands.add_parser(role, help=purpose)
        command.add_argument("--config", type=Path, required=True, help="the run's run.json")
        command.add_argument("--incarnation", type=int, required=True, help="how often the run was started")
    return parser


def _run_role(role: str, config_file: Path, incarnation: int) -> int:
    from minpro_megatron.launch.prctl import end_with_parent

    # A rank may hang in a collective, where it would never get to handle SIGTERM; it owns nothing to tidy up.
    end_with_parent(signal.SIGKILL if role == "train" else signal.SIGTERM)
    from minpro_megatron.launch.recipe import read_config

    config = read_config(config_file)
    return importlib.import_module(f"minpro_megatron.roles.{role}").run(config, incarnation)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from minpro_megatron.launch.user_error import UserError

    try:
        if options.command in ROLES:
            return _run_role(options.command, options.config, options.incarnation)
        from minpro_megatron.launch.launcher import launch

        return launch(options.recipe, options.overrides)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
