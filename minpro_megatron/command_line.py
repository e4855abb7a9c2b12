"""What all commands have in common: their parser, how a mistake in the arguments is reported, and the terminal."""

import argparse
import difflib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "minpro"
# The width of what is written to a file or a pipe, so that no line of a table is cut or wrapped.
_UNLIMITED_WIDTH = 1000


class Parser(argparse.ArgumentParser):
    """Reports what is wrong in one line, with exit status 2. A value that is not among an option's choices, or the name
    of a command that does not exist, is reported with the choices that are most similar."""

    # argparse has no public way to add to this message before Python 3.14.
    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{did_you_mean(str(value), choices)}; known: {', '.join(choices)}"
            )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


def command_parser(docstring: str | None, prog: str) -> Parser:
    """The parser of a command whose docstring is its help: the docstring's lines stay as they are."""
    return Parser(prog=prog, description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The hint ` (did you mean ...?)` with up to two known names: those that begin with `given`, then the most similar.
    Empty without any. Upper and lower case are the same.

    >>> did_you_mean("H100", ["h100-80gb", "h200-141gb"]), did_you_mean("nothing", ["h100-80gb"])
    (' (did you mean h100-80gb?)', '')
    """
    by_lower_case = {name.lower(): name for name in known}
    wanted = given.lower()
    longer = [name for name in by_lower_case if len(wanted) > 2 and name.startswith(wanted)]
    similar = [*longer, *difflib.get_close_matches(wanted, list(by_lower_case), n=2, cutoff=0.7)]
    shown = [by_lower_case[name] for name in list(dict.fromkeys(similar))[:2]]
    return f" (did you mean {' or '.join(shown)}?)" if shown else ""


def make_console() -> "Console":
    """The console for a command's output. Output that goes to a file or a pipe has no limit of width."""
    from rich.console import Console  # imported here, because it takes time and most commands do not need it

    return Console(highlight=False, width=None if sys.stdout.isatty() else _UNLIMITED_WIDTH)


# Types of options. Each raises ArgumentTypeError, which argparse reports with the option's name.


def whole_number(text: str) -> int:
    """A whole number from 0 on."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def count(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments `recipe` and `overrides`, for launch.recipe.load_recipe and apply_overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="module:function, such as recipes.qwen3_30b_a3b:minpro")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run to change")


def positive(text: str) -> float:
    """A number above 0."""
    return _number_between(text, 1e9, "number above 0")


def share(text: str) -> float:
    """A number between 0 and 1."""
    return _number_between(text, 1, "share between 0 and 1")


def _number_between(text: str, limit: float, expected: str) -> float:
    """A number above 0 and below `limit`."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < limit:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {expected}")
    return value


def names(text: str) -> list[str]:
    """Distinct names, separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected distinct names, separated by commas")
    return found
