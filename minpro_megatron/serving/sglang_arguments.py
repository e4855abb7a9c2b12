"""Checks the setting `server.arguments` with the parser of SGLang's own ServerArgs.

    python -m minpro_megatron.serving.sglang_arguments < {"arguments": {...}, "command": [...]} > ["problem", ...]

It runs in a process of its own, because importing SGLang takes seconds and much memory. Options that contradict each
other are found when a server starts: SGLang compares them with its GPUs and its model.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from minpro_megatron.command_line import did_you_mean
from minpro_megatron.config.library_settings import owners, refusal

_SECTION = "server.arguments"


class _Refused(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    """A parser that knows its options by name, and raises instead of ending the process."""

    def __init__(self) -> None:
        self.options: dict[str, argparse.Action] = {}  # such as "--tp-size"
        super().__init__(prog="sglang", allow_abbrev=False)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self.options |= dict.fromkeys(action.option_strings, action)
        return action

    def error(self, message: str) -> NoReturn:
        raise _Refused(message)


def argument_problems(arguments: Mapping[str, Any], command: Sequence[str]) -> list[str]:
    """A line for each entry of `arguments`, the setting, that SGLang does not have, has under another name, or that
    another setting decides; else one if SGLang does not accept the options `command` of a server, which include
    them."""
    from sglang.srt.server_args import ServerArgs

    parser = _Parser()
    ServerArgs.add_cli_args(parser)
    found = list(_unknown_names(arguments, parser))
    if found:
        return found
    try:
        ServerArgs.from_cli_args(parser.parse_args(list(command)))
    except (_Refused, ValueError, TypeError) as error:
        return [f"{_SECTION}: SGLang refuses the server's options: {error}; correct or remove the entry"]
    return []


def _unknown_names(arguments: Mapping[str, Any], parser: _Parser) -> Iterator[str]:
    owner_of = owners(_SECTION)
    names = {option.removeprefix("--").replace("-", "_"): action for option, action in parser.options.items()}
    for name, value in arguments.items():
        if "-" in name:
            yield f"{_SECTION}.{name}: write it with underscores, {name.replace('-', '_')}"
        elif name not in names:
            hint = did_you_mean(name, names)
            yield f"{_SECTION}.{name}: SGLang's server has no option --{name.replace('_', '-')}{hint}"
        elif names[name].dest in owner_of:  # under a second name, such as tensor_parallel_size
            yield f"{_SECTION}.{refusal(name, owner_of[names[name].dest])}"
        elif value is False and f"--no-{name.replace('_', '-')}" not in parser.options:
            yield f"{_SECTION}.{name} = false: this option can only be given; null leaves it out"


def main() -> int:
    """Read the setting and a server's command line from the standard input, and write the problems."""
    given = json.load(sys.stdin)
    print(json.dumps(argument_problems(given["arguments"], given["command"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
