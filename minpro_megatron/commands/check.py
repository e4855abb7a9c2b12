"""The command `check`: the checks before a launch, without the launch."""

from minpro_megatron.command_line import Parser, add_recipe
from minpro_megatron.errors import UserError, run_reporting
from minpro_megatron.planning.gpus import GPU_KINDS


def main(arguments: list[str] | None = None, prog: str = "minpro check") -> int:
    """0 if a launch would start, 2 after one line for each problem."""
    parser = Parser(
        prog=prog,
        description="Checks a recipe as `launch` does before it starts anything: the settings, the files of model and "
        "data, the mesh, the rewards, the machine's ports, GPUs and disk, and the run folder. Nothing is written.",
    )
    add_recipe(parser)
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="also rehearse a trainer rank of each kind (`minpro rehearse`): minutes for each",
    )
    parser.add_argument(
        "--gpu",
        default="h100-80gb",
        choices=list(GPU_KINDS),
        help="kind of GPU into which a rehearsed rank must fit (default: h100-80gb)",
    )
    options = parser.parse_intermixed_args(arguments)  # settings may come before and after options
    return run_reporting(lambda: _check(options.recipe, options.overrides, options.gpu if options.rehearse else ""))


def _check(recipe: str, overrides: list[str], rehearsed_gpu: str) -> int:
    from minpro_megatron.launch.preflight.run_checks import problems, warnings
    from minpro_megatron.launch.recipe import apply_overrides, load_recipe
    from minpro_megatron.launch.resume import finished_summary

    config = apply_overrides(load_recipe(recipe), overrides)
    if finished_summary(config) is not None:
        print(f"the run {config.name} has finished; its results are in {config.run_dir}")
        return 0
    found = problems(config)
    if rehearsed_gpu:  # also on a machine without GPUs and model files, whose absence is found above
        from minpro_megatron.rehearsal.verdict import rehearsal_problems

        if found:
            print(f"the problems found so far, {len(found)}, are listed after the rehearsal")
        found += rehearsal_problems(recipe, config, overrides, rehearsed_gpu)
    if found:
        raise UserError(found)
    for warning in warnings(config):
        print(f"warning: {warning}")
    print(f"no problem found: the run {config.name} can start here; its folder will be {config.run_dir}")
    return 0
