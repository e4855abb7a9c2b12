"""The command `launch`: a recipe with all roles on this machine."""

from minpro_megatron.command_line import Parser, add_recipe
from minpro_megatron.errors import run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro launch") -> int:
    """The status code of the run; 2 after a message about a wrong setting or input."""
    parser = Parser(
        prog=prog,
        description="Runs a recipe with all roles on this machine. The same command resumes a run that has ended "
        "early, and shows the results of a run that has finished.",
    )
    add_recipe(parser)
    options = parser.parse_args(arguments)

    def run() -> int:
        from minpro_megatron.launch.launcher import launch

        return launch(options.recipe, options.overrides)

    return run_reporting(run)
