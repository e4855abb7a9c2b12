"""A plan as plain numbers, for JSON."""

import math
from dataclasses import asdict
from typing import Any

from minpro_megatron.planning.first_checkpoint import first_checkpoint
from minpro_megatron.planning.parameters import active_parameters, model_parameters
from minpro_megatron.planning.plan import Plan


def numbers(plan: Plan) -> dict[str, Any]:
    """All values of the plan, in bytes, seconds and shares of 1."""
    parallel, first = plan.config.parallel, first_checkpoint(plan)
    return {
        "run": plan.config.name,
        "fits": not plan.problems,
        "problems": plan.problems,
        "model": {
            "name": plan.architecture.name,
            "parameters": model_parameters(plan.architecture),
            "active_parameters": active_parameters(plan.architecture),
        },
        "cluster": asdict(plan.cluster) | {"gpu": asdict(plan.cluster.kind), "gpus_per_node": plan.cluster.node_size},
        "parallel": parallel.model_dump() | {"data": parallel.data_size, "world_size": parallel.world_size},
        "settings": plan.settings,
        "workload": asdict(plan.workload),
        "ranks": [
            asdict(rank)
            | {"states": rank.states, "total": rank.total}
            | {"activations": asdict(rank.activations) | {"peak": rank.activations.peak}}
            for rank in plan.ranks
        ],
        "server": asdict(plan.server) | {"count": plan.num_servers, "max_running": plan.max_running},
        "turns": None if plan.turns is None else asdict(plan.turns),
        "host": asdict(plan.host) | {"total": plan.host.total},
        "route_files": plan.route_file_bytes,
        "step": {
            "seconds": plan.step_s,
            "generation": plan.generation_s,
            **asdict(plan.cost),
            "trainer_wait_share": plan.wait_share,
            "server_idle_share": plan.idle_share,
            "server_slot_share": plan.slot_share,
            "seconds_with_evaluations_and_checkpoints": plan.mean_step_s,
        },
        "evaluation": asdict(plan.evaluation),
        "first_checkpoint": {
            "steps_between": plan.steps_between_checkpoints,
            "earliest_s": first.earliest,
            "planned_s": first.planned if math.isfinite(first.planned) else None,
        },
        # JSON has no infinity: a split that does not fit has no step time
        "splits": [asdict(one) | {"step_s": one.step_s if math.isfinite(one.step_s) else None} for one in plan.splits],
        "timeline": [asdict(span) for span in plan.timeline.spans],
    }
