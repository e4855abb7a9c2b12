"""Predicts whether a run fits on a cluster and how long a global step takes.

    minpro plan recipes.qwen3_30b_a3b:minpro
    minpro plan recipes.qwen3_30b_a3b:minpro --gpus 64 --gpu h100-80gb model.recompute=full
    minpro plan RECIPE --gpus 64 --mean-response-tokens 6000 --picture plan.png

Without --gpus the GPUs are those of the recipe's mesh and servers; with it, every split of them between trainer and
servers is tried and the fastest is shown. Nothing is started, no GPU is needed, and of the model only its config.json,
or its name if it is a known release. Exit status: 0 if the run fits, 1 if not, 2 for a wrong command line.

Durations are based on data sheets and a few published measurements (planning/cost_model.py). Values that a run's
settings do not determine, above all the lengths of responses, are assumed and can be given here: all options but the
recipe's settings describe the cluster or these assumptions, so none is a setting of a run. benchmarks/plan_run.md
compares the model with published runs.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from minpro_megatron.command_line import add_recipe, command_parser, make_console, positive, whole_number
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import run_reporting
from minpro_megatron.launch.recipe import apply_overrides, load_recipe
from minpro_megatron.planning.first_checkpoint import time_limit_problems
from minpro_megatron.planning.gpus import GPU_KINDS
from minpro_megatron.planning.modes import other_modes
from minpro_megatron.planning.numbers import numbers
from minpro_megatron.planning.plan import ClusterSize, plan_run
from minpro_megatron.planning.tables import print_plan
from minpro_megatron.planning.workload import ANSWER_S, ANSWER_TOKENS, PROMPT_TOKENS, RESPONSE_SHARE, Workload

DOES_NOT_FIT, WRONG_COMMAND_LINE = 1, 2


def parse_arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    add_recipe(parser)
    parser.add_argument("--gpu", default="h100-80gb", choices=list(GPU_KINDS), help="kind of GPU (default: h100-80gb)")
    parser.add_argument(
        "--gpus", type=whole_number, default=0, help="of trainer and servers together: find the best split"
    )
    parser.add_argument("--trainer-gpus", type=whole_number, default=0, help="with --server-gpus: try only this split")
    parser.add_argument("--server-gpus", type=whole_number, default=0, help="with --trainer-gpus: try only this split")
    parser.add_argument("--gpus-per-node", type=whole_number, default=0, help="default: the kind's usual node")
    parser.add_argument(
        "--mean-prompt-tokens",
        type=float,
        help=f"default: {PROMPT_TOKENS}, or the longest allowed if that is less",
    )
    parser.add_argument(
        "--mean-response-tokens",
        type=float,
        help=f"default: {RESPONSE_SHARE:.0%} of sampling.max_response_tokens".replace("%", " %%"),
    )
    episodes = "of a run with an environment"
    parser.add_argument(
        "--mean-turns", type=positive, help=f"of the policy, {episodes} (default: half of sampling.max_turns + 1)"
    )
    parser.add_argument(
        "--answer-tokens",
        type=whole_number,
        help=f"of each answer, {episodes}; they count as response tokens (default: {ANSWER_TOKENS}, or fewer in short "
        "responses)",
    )
    parser.add_argument(
        "--answer-seconds",
        type=positive,
        help=f"until the environment has answered a turn, {episodes} (default: {ANSWER_S:g})",
    )
    parser.add_argument(
        "--time-limit-hours", type=positive, help="of one start of the job: is a checkpoint reached in it?"
    )
    parser.add_argument("--modes", action="store_true", help="also the step under other delays and bounds")
    parser.add_argument("--json", action="store_true", help="print all numbers instead of tables")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="also draw timeline and memory")
    return parser.parse_intermixed_args(arguments)


def cluster_of(options: argparse.Namespace, config: RunConfig) -> ClusterSize:
    trainer, servers = options.trainer_gpus, options.server_gpus
    if not options.gpus and not trainer and not servers:
        trainer, servers = config.parallel.world_size, config.server.count * config.server.tensor_parallel
    return ClusterSize(options.gpu, trainer, servers, options.gpus, options.gpus_per_node)


def main(arguments: list[str] | None = None, prog: str = "minpro plan") -> int:
    """0 if the run fits, 1 if not, 2 after a message about a wrong option."""
    options = parse_arguments(arguments, prog)
    return run_reporting(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    config = apply_overrides(load_recipe(options.recipe), options.overrides)
    workload = Workload.of(
        config,
        options.mean_response_tokens,
        options.mean_prompt_tokens,
        options.mean_turns,
        options.answer_tokens,
        options.answer_seconds,
    )
    plan = plan_run(config, cluster_of(options, config), workload)
    if options.time_limit_hours:
        found = time_limit_problems(plan, 3600 * options.time_limit_hours)
        plan = replace(plan, problems=[*plan.problems, *found])
    modes = other_modes(plan) if options.modes else []
    if options.json:
        print(json.dumps(numbers(plan) | {"modes": [asdict(mode) for mode in modes]}, indent=2))
    else:
        print_plan(make_console(), plan, modes)
    if options.picture:
        # imported late: it takes a second, and only a picture needs it
        from minpro_megatron.report.plan_picture import draw

        draw(plan, options.picture)
    return DOES_NOT_FIT if plan.problems else 0
