"""What the commands of this folder have in common."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from minpro_megatron.errors import UserError


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def told(command: Callable[[], int]) -> int:
    """The command's exit status; for what a user can mend 2, with a line for each problem."""
    try:
        return command()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
