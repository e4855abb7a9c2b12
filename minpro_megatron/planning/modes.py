"""The same run on the same GPUs with other settings of staleness, to show the gain of off-policy training."""

from dataclasses import dataclass

from minpro_megatron.config.run import with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.planning.plan import ClusterSize, Plan, plan_run

# (mode, its setting, values)
TRIED = [("delay", "delay_steps", (0, 1, 2, 4)), ("bounded", "max_staleness", (1, 2, 4))]


@dataclass(frozen=True)
class ModeTime:
    """A setting of staleness, the duration of a step with it, and the idle shares."""

    mode: str
    steps: int
    step_s: float
    wait_share: float
    idle_share: float
    slot_share: float
    fits: bool


def other_modes(plan: Plan) -> list[ModeTime]:
    """The step times of other modes; modes that other settings of the run do not allow are excluded."""
    server = plan.config.server
    cluster = ClusterSize(
        plan.cluster.gpu,
        trainer_gpus=plan.config.parallel.world_size,
        server_gpus=server.count * server.tensor_parallel,
        gpus_per_node=plan.cluster.gpus_per_node,
    )
    found = []
    for mode, setting, values in TRIED:
        for steps in values:
            try:
                config = with_overrides(plan.config, [f"staleness.mode={mode}", f"staleness.{setting}={steps}"])
            except UserError:
                continue
            other = plan_run(config, cluster, plan.workload)
            times = (other.step_s, other.wait_share, other.idle_share, other.slot_share)
            found.append(ModeTime(mode, steps, *times, fits=not other.problems))
    return found
