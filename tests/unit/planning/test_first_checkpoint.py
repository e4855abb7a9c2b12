"""Whether a job's time limit is long enough for the first checkpoint, by the planner."""

import math
from dataclasses import replace

import pytest

from minpro_megatron.cluster.planning import plan_problems
from minpro_megatron.cluster.profile import Profile
from minpro_megatron.planning.first_checkpoint import START_UP_S, first_checkpoint, run_s, time_limit_problems
from minpro_megatron.planning.plan import ClusterSize, Plan, plan_run
from tests.support.planned_runs import run_to_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    """100 global steps, a checkpoint after every tenth."""
    return planned()


def planned(**checkpoint: object) -> Plan:
    config = run_to_plan(num_global_steps=100, checkpoint=checkpoint)
    return plan_run(config, ClusterSize("h100-80gb", config.parallel.world_size, 8))


def test_the_first_checkpoint_comes_after_the_first_step_at_the_earliest(plan: Plan) -> None:
    found = first_checkpoint(plan)
    first_step_s = plan.timeline.step_ends[0] + plan.evaluation.added_s
    assert found.earliest == pytest.approx(START_UP_S + first_step_s + plan.cost.checkpoint_written)
    # the first steps differ from those in mid-run by what is sampled before them
    assert found.planned == pytest.approx(found.earliest + 9 * plan.step_s, rel=0.3)
    assert run_s(plan) > found.planned + 80 * plan.step_s
    none = replace(plan, steps_between_checkpoints=0)
    assert first_checkpoint(none).planned == math.inf


def test_minutes_and_steps_say_how_often_it_saves_whichever_comes_first(plan: Plan) -> None:
    assert plan.steps_between_checkpoints == 10
    minutes = 3.5 * plan.step_s / 60
    assert planned(every_minutes=minutes).steps_between_checkpoints == 4
    assert planned(every_minutes=minutes, every_steps=2).steps_between_checkpoints == 2
    assert planned(every_minutes=100 * minutes).steps_between_checkpoints == 10
    assert planned(every_minutes=0, every_steps=0).steps_between_checkpoints == 0


def test_a_limit_before_the_first_checkpoint_is_a_problem(plan: Plan) -> None:
    earliest = first_checkpoint(plan).earliest
    assert time_limit_problems(plan, earliest + 1) == []
    (problem,) = time_limit_problems(plan, earliest - 60)
    assert problem.startswith(
        f"time limit: a start may take {(earliest - 60) / 3600:.2f} h, but the first checkpoint is"
    )
    assert "so every restart would begin from the start: raise the time limit" in problem


def test_a_run_that_saves_nothing_must_end_within_the_limit(plan: Plan) -> None:
    config = run_to_plan(num_global_steps=100, checkpoint={"every_steps": 0})
    plan = replace(plan, config=config)
    assert time_limit_problems(plan, run_s(plan)) == []
    (problem,) = time_limit_problems(plan, run_s(plan) - 60)
    assert "saves no checkpoint before its end (checkpoint.every_steps = 0, every_minutes = 0)" in problem
    assert "set checkpoint.every_minutes or checkpoint.every_steps, or raise the time limit" in problem


@pytest.mark.parametrize(("time", "refused"), [("00:20:00", True), ("24:00:00", False), ("UNLIMITED", False)])
def test_a_submission_is_refused_whose_time_limit_is_too_short(time: str, refused: bool) -> None:
    config = run_to_plan(num_global_steps=100)
    profile = Profile.model_validate({"workspace": "/w", "slurm": {"time": time}})
    found = plan_problems(config, profile)
    assert [problem[:11] for problem in found] == (["time limit:"] if refused else [])
    assert plan_problems(config, profile.model_copy(update={"executor": "local"})) == []
