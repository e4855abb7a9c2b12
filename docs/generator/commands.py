"""The reference pages of the commands, from the parsers of the commands themselves."""

import argparse
import importlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from docs.generator.markdown import cell
from minpro_megatron.__main__ import COMMANDS, GROUPS


class _Found(BaseException):
    """Carries a command's parser out of the command, before it parses anything. Not an Exception: a command may handle
    those."""

    def __init__(self, parser: argparse.ArgumentParser, method: str) -> None:
        super().__init__(method)
        self.parser, self.method = parser, method


def parser_of(name: str) -> tuple[argparse.ArgumentParser, str]:
    """The parser of the command `name`, and the name of the parser's method that the command calls."""
    command = COMMANDS[name]
    function = getattr(importlib.import_module(command.module), command.function)

    def stop(method: str) -> Any:
        def raise_found(self: argparse.ArgumentParser, *_: object) -> None:
            raise _Found(self, method)

        return patch.object(argparse.ArgumentParser, method, raise_found)

    with stop("parse_args"), stop("parse_intermixed_args"):
        try:
            function([], f"minpro {name}")
        except _Found as found:
            return found.parser, found.method
    raise AssertionError(f"minpro {name} parses no arguments")


def overview() -> str:
    """The table of all commands, by group, with links to the pages of `group_pages`."""
    lines = [
        "`minpro COMMAND` and `python -m minpro_megatron COMMAND` are the same. `minpro COMMAND --help` prints what "
        "these pages say. A mistake in the arguments ends a command with one line and exit status 2.",
    ]
    for title, commands in GROUPS.items():
        lines += ["", f"## {_capital(title)}", "", "| command | purpose |", "|---|---|"]
        for name, command in commands.items():
            lines.append(f"| [`minpro {name}`]({page_name(title)}#minpro-{name}) | {command.summary} |")
    return "\n".join(lines) + "\n"


def group_pages() -> Iterator[tuple[str, str, str]]:
    """(file name, title, text) of the page of each group of commands."""
    for title, commands in GROUPS.items():
        yield page_name(title), f"Commands: {title}", "\n\n".join(map(_command, commands)) + "\n"


def page_name(title: str) -> str:
    return f"commands_{'_'.join(title.removeprefix('a ').split())}.md"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _command(name: str) -> str:
    parser, _ = parser_of(name)
    parts = [f"## minpro {name}", _description(parser), *_arguments(parser)]
    for names, sub_parser in _sub_commands(parser):
        parts.append(f"### minpro {name} {', '.join(names)}")
        if sub_parser.description and sub_parser.description != parser.description:
            parts.append(_description(sub_parser))
        parts += _arguments(sub_parser)
    return "\n\n".join(parts)


def _description(parser: argparse.ArgumentParser) -> str:
    return f"```text\n{inspect.cleandoc(parser.description or '').rstrip()}\n```"


def _arguments(parser: argparse.ArgumentParser) -> list[str]:
    """The table of a parser's arguments, if it has any."""
    not_listed = (argparse._HelpAction, argparse._SubParsersAction)
    rows = [_row(action) for action in parser._actions if not isinstance(action, not_listed)]
    return ["\n".join(["| argument | meaning |", "|---|---|", *rows])] if rows else []


def _row(action: argparse.Action) -> str:
    value = _value(action)
    names = ", ".join(f"{name} {value}".strip() for name in action.option_strings) or value
    text = " ".join((action.help or "").split()) % {"default": action.default}
    required = "; required" if action.option_strings and action.required else ""
    return f"| `{cell(names)}` | {cell(text)}{required} |"


def _value(action: argparse.Action) -> str:
    """The placeholder of an argument's value, as argparse's help shows it."""
    if action.nargs == 0:
        return ""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices is not None else ""
    shown = action.metavar or choices or (action.dest.upper() if action.option_strings else action.dest)
    name = shown if isinstance(shown, str) else " ".join(shown)
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]"}.get(str(action.nargs), name)


def _sub_commands(parser: argparse.ArgumentParser) -> list[tuple[list[str], argparse.ArgumentParser]]:
    """The sub-commands' parsers, each with its names; those with the same arguments are put together."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    together: dict[str, tuple[list[str], argparse.ArgumentParser]] = {}
    for name, sub_parser in (found[0].choices if found else {}).items():
        together.setdefault("".join(_arguments(sub_parser)), ([], sub_parser))[0].append(name)
    return list(together.values())
