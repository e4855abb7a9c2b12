"""The command `node`: one node's share of a run on several nodes. A cluster's job starts it."""

from pathlib import Path

from minpro_megatron.command_line import Parser
from minpro_megatron.errors import run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro node") -> int:
    """The status code of this node's roles."""
    parser = Parser(
        prog=prog,
        description="Runs this node's share of a run, as one process per node. The first node prepares the run folder, "
        "all nodes check themselves, and then the roles start.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's settings, written by `submit`")
    parser.add_argument("--topology", type=Path, required=True, help="shares of the nodes, written by `submit`")
    parser.add_argument("--job", metavar="NAME", help="name of the job, the same for all starts (default: Slurm's job)")
    parser.add_argument(
        "--start",
        metavar="NAME",
        help="name of this start, the same on all nodes and new for every start (default: Slurm's job and restart); "
        "with --job it is the job's name, a hyphen and a number",
    )
    parser.add_argument("--index", type=int, metavar="N", help="index of this node, from 0 (default: Slurm's)")
    parser.add_argument("--interface", default="", metavar="NAME", help="network interface that connects the nodes")
    parser.add_argument(
        "--end-early-s",
        type=float,
        default=0.0,
        metavar="X",
        help="seconds before the job's end at which SIGTERM arrives (default: 0)",
    )
    given = vars(parser.parse_args(arguments))

    def run() -> int:
        from minpro_megatron.launch.node import NodeOptions, run_node

        return run_node(NodeOptions(**given))

    return run_reporting(run)
