"""The planner's figures in docs/cluster.md are those that it computes now."""

import re
from pathlib import Path

import pytest

from minpro_megatron.launch.recipe import load_recipe
from minpro_megatron.planning.cluster_size import ClusterSize
from minpro_megatron.planning.plan import Plan, plan_run

PAGE = Path(__file__).parents[3] / "docs" / "cluster.md"
ROW = r"^\| `(\w+:\w+)` \| (\d+) \| ([^|]+) \| (\d+) servers of (\d) \| (\d+) \| ([\d,]+) \|$"
ROWS = re.findall(ROW, PAGE.read_text(), re.MULTILINE)
EVALUATION = re.findall(r"samples ([\d,]+) responses and makes the run ([^h]+) hours", PAGE.read_text())


def plan_of(recipe: str) -> Plan:
    config = load_recipe(f"recipes.{recipe}")
    gpus = config.server.count * config.server.tensor_parallel
    return plan_run(config, ClusterSize("h100-80gb", config.parallel.world_size, gpus))


@pytest.mark.long  # seconds for each
@pytest.mark.parametrize("place", range(7))
def test_the_table_has_the_planners_figures(place: int) -> None:
    recipe, gpus, mesh, servers, of, rank_gb, step_s = ROWS[place]
    plan = plan_of(recipe)
    parallel, server = plan.config.parallel, plan.config.server
    trains, serves = parallel.world_size, server.count * server.tensor_parallel
    assert (max(trains, serves) if server.takes_turns else trains + serves) == int(gpus)
    assert (server.count, server.tensor_parallel) == (int(servers), int(of))
    for degree, value in re.findall(r"(tensor|context|expert|data) (\d+)", mesh):
        assert getattr(parallel, f"{degree}_size" if degree == "data" else degree) == int(value)
    assert round(max(rank.total for rank in plan.ranks) / 1e9) == int(rank_gb)
    assert f"{plan.step_s:,.0f}" == step_s
    assert EVALUATION, "the page has no sentence about evaluations"
    responses, hours = EVALUATION[0]
    assert f"{plan.evaluation.responses:,}" == responses
    assert f"{plan.evaluation.added_s / 3600:.1f}" == re.findall(r"\d+\.\d", hours)[place]
