"""What all commands have in common: a mistake in the arguments is one line, with exit status 2."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Reports what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


def tool_parser(docstring: str | None) -> Parser:
    """The parser of a tool whose docstring is its help: the docstring's lines stay as they are."""
    return Parser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
