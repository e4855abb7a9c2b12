"""The command `recipes`: the recipes by their names for the other commands."""

from minpro_megatron.command_line import Parser
from minpro_megatron.errors import run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro recipes") -> int:
    """0, or 2 after a message about a module that has no recipes."""
    parser = Parser(prog=prog, description="Lists recipes: the name of each one and what it runs.")
    parser.add_argument(
        "module",
        nargs="?",
        default="recipes",
        metavar="MODULE",
        help="module or package with recipes (default: recipes)",
    )
    options = parser.parse_args(arguments)
    return run_reporting(lambda: _list(options.module))


def _list(module: str) -> int:
    from minpro_megatron.launch.recipe import list_recipes

    print("\n".join(list_recipes(module)))
    return 0
