"""The time of a run's first complete checkpoint: a job whose time limit is shorter restarts from the beginning."""

import math
from dataclasses import dataclass

from minpro_megatron.buffer.staleness import evaluated_versions
from minpro_megatron.config.run import RunConfig
from minpro_megatron.planning.plan import Plan

# Assumed time from the start of a job to the first sampled token: containers, weights, compilation and warm-up.
START_UP_S = 900.0


@dataclass(frozen=True)
class FirstCheckpoint:
    """Seconds after the start of the job at which the first checkpoint is complete.

    `earliest`: after the first global step, which a run with a time limit saves if no further step fits. `planned`: by
    checkpoint.every_steps or every_minutes; infinite if neither saves before the run's end."""

    earliest: float
    planned: float


def first_checkpoint(plan: Plan) -> FirstCheckpoint:
    """The first checkpoint of the run in `plan`."""
    written = START_UP_S + plan.cost.checkpoint_written
    every = plan.steps_between_checkpoints
    return FirstCheckpoint(
        earliest=written + _end_of_step(plan, 1),
        planned=written + _end_of_step(plan, every) if every else math.inf,
    )


def run_s(plan: Plan) -> float:
    """Seconds from the start of the job to the end of the run without interruptions."""
    return START_UP_S + _end_of_step(plan, plan.config.num_global_steps)


def time_limit_problems(plan: Plan, limit_s: float) -> list[str]:
    """One line if a start of `limit_s` seconds is too short for the first checkpoint, so that every restart would begin
    at the beginning."""
    config = plan.config
    if run_s(plan) <= limit_s:
        return []
    if not config.checkpoint.saves_before_end:
        return [
            f"time limit: a start may take {_hours(limit_s)}, the run takes {_hours(run_s(plan))} and saves no "
            f"checkpoint before its end ({_settings(config)}), so every restart would begin from the start: set "
            "checkpoint.every_minutes or checkpoint.every_steps, or raise the time limit"
        ]
    first = first_checkpoint(plan)
    if first.earliest <= limit_s:
        return []
    return [
        f"time limit: a start may take {_hours(limit_s)}, but the first checkpoint is complete after "
        f"{_hours(first.earliest)} at the earliest ({START_UP_S / 60:.0f} min assumed for the start, the first global "
        "step, its evaluation and the save), so every restart would begin from the start: raise the time "
        "limit, lower batch.num_prompts, or take more GPUs"
    ]


def _end_of_step(plan: Plan, count: int) -> float:
    """Seconds from the first sampled token to the end of the first `count` global steps. Each evaluation takes as
    long as one in the middle of the run."""
    ends, config = plan.timeline.step_ends, plan.config
    steps = ends[count - 1] if count <= len(ends) else ends[-1] + (count - len(ends)) * plan.step_s
    versions = evaluated_versions(config.num_global_steps, config.evaluation.every_steps)
    return steps + plan.evaluation.added_s * sum(version < count for version in versions)


def _settings(config: RunConfig) -> str:
    return (
        f"checkpoint.every_steps = {config.checkpoint.every_steps}, every_minutes = {config.checkpoint.every_minutes:g}"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h"
