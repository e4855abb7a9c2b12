"""Checks with the planner whether the run fits the GPUs and the time limit of the profile, before anything is sent."""

from minpro_megatron.cluster.profile import Profile
from minpro_megatron.cluster.sections import seconds_of
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.launch.roles import roles_of
from minpro_megatron.planning.first_checkpoint import time_limit_problems
from minpro_megatron.planning.plan import ClusterSize, plan_run


def plan_problems(config: RunConfig, profile: Profile) -> list[str]:
    """One line for each reason why the run does not fit. A run without its own trainer or servers, or without GPUs, is
    not planned."""
    server = config.server
    on_gpus = config.device == "cuda" and server.device == "cuda" and server.engine != "reference"
    if not on_gpus or server.urls or not {"train", "serve"} <= set(roles_of(config)):
        return []
    try:
        size = ClusterSize(
            gpu=profile.gpu,
            trainer_gpus=config.parallel.world_size,
            server_gpus=server.count * server.tensor_parallel,
            gpus_per_node=profile.topology.gpus_per_node,
        )
        plan = plan_run(config, size)
        limit_s = seconds_of(profile.slurm.time) if profile.executor == "slurm" else None
        late = [] if limit_s is None else time_limit_problems(plan, limit_s - profile.slurm.end_early_s)
        return [*plan.problems, *late]
    except UserError as error:  # a model or a GPU that is unknown to the planner
        return error.problems
