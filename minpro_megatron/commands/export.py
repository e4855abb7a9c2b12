"""The command `export`: a policy version of a run as a Hugging Face folder."""

from pathlib import Path

from minpro_megatron.command_line import Parser
from minpro_megatron.errors import run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro export") -> int:
    """0, or 2 after a message about a run without such a checkpoint."""
    parser = Parser(
        prog=prog,
        description="Writes the weights of a run's checkpoint, unchanged, as a Hugging Face folder with the config and "
        "the tokenizer of the run's initial model.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder, such as runs/demo")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a new folder, or that of an earlier export"
    )
    parser.add_argument(
        "--version",
        metavar="best|last|N",
        default="best",
        help="the one with the highest evaluation score, the newest, or a policy version (default: best)",
    )
    parser.add_argument("--verify", action="store_true", help="compare the result with the checkpoint, bit by bit")
    given = vars(parser.parse_args(arguments))

    def run() -> int:
        from minpro_megatron.launch.export import ExportOptions, export

        return export(ExportOptions(**given))

    return run_reporting(run)
