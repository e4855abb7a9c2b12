"""Rehearse a trainer rank of a recipe at full size, on a machine without GPUs and without the model's files.

    minpro rehearse recipes.qwen3_30b_a3b:minpro
    minpro rehearse recipes.qwen3_30b_a3b:minpro --rank 17 model.recompute=none
    minpro rehearse RECIPE --all-kinds --json > rehearsal.json

The trainer's real code runs as one rank of the recipe's mesh on tensors without content: build, score, updates,
snapshot and publication. The output is the memory on device and host by phase, the same beside the planner's figures,
every collective, every place where the host waits for the device, and every mismatch of devices, dtypes or shapes.
Nothing is computed or sent. docs/rehearsal.md explains what this shows, and what only a GPU can show.

Of the model only config.json is read, or its name if it is a known release. A rank takes a few minutes on one core,
and 2 GB of memory. Exit status: 0 without a problem, 1 with one, 2 for a wrong command line.
"""

import argparse
import json
from typing import TYPE_CHECKING

from minpro_megatron.command_line import add_recipe, command_parser, count, make_console, positive, whole_number
from minpro_megatron.errors import FAILED, SUCCEEDED, run_reporting
from minpro_megatron.launch.recipe import apply_overrides, load_recipe

if TYPE_CHECKING:
    from minpro_megatron.rehearsal.record import RankRehearsal
    from minpro_megatron.rehearsal.subject import Rehearsed


def parse_arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    add_recipe(parser)
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--rank", type=whole_number, default=0, metavar="R", help="the rank (default: 0)")
    ranks.add_argument("--all-kinds", action="store_true", help="one rank of each kind, one after the other")
    parser.add_argument("--layers", type=count, default=0, metavar="N", help="shorten the model to N layers")
    parser.add_argument(
        "--imbalance",
        type=positive,
        default=1.0,
        metavar="X",
        help="rows that a rank's experts get, over those of even routing (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list with an object per rank")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None, prog: str = "minpro rehearse") -> int:
    """0 without a problem, 1 with one, 2 after a message about a wrong option or setting."""
    options = parse_arguments(arguments, prog)
    return run_reporting(lambda: _rehearse(options))


def _rehearse(options: argparse.Namespace) -> int:
    from minpro_megatron.rehearsal.processes import rehearse_kinds
    from minpro_megatron.rehearsal.subject import Rehearsed

    config = apply_overrides(load_recipe(options.recipe), options.overrides)
    what = Rehearsed(options.recipe, config, options.rank, options.layers, options.imbalance)
    found = list(rehearse_kinds(what, options.overrides)) if options.all_kinds else [_of_rank(what)]
    if options.json:
        print(json.dumps([one.as_json() for one in found], indent=1))
    else:
        from minpro_megatron.rehearsal.tables import print_rehearsal

        console = make_console()
        for one in found:
            print_rehearsal(console, one)
    return FAILED if any(one.problems for one in found) else SUCCEEDED


def _of_rank(what: "Rehearsed") -> "RankRehearsal":
    from minpro_megatron.rehearsal.rank import rehearse_rank

    return rehearse_rank(what)
