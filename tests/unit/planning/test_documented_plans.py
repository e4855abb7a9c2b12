"""The planner's figures in docs/cluster.md, benchmarks/step_time.md and the recipes are those that it computes now."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.launch.recipe import load_recipe
from minpro_megatron.models.known_models.find import find_architecture
from minpro_megatron.planning.cluster_size import ClusterSize
from minpro_megatron.planning.memory import server_memory
from minpro_megatron.planning.plan import Plan, plan_run
from minpro_megatron.recipes import qwen3_8b, qwen3_14b, qwen3_30b_a3b

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "cluster.md"
ROW = r"^\| `(\w+:\w+)` \| (\d+) \| ([^|]+) \| (\d+) servers of (\d) \| (\d+) \| ([\d,]+) \|$"
ROWS = re.findall(ROW, PAGE.read_text(), re.MULTILINE)
EVALUATION = re.findall(r"samples ([\d,]+) responses and makes the run ([^h]+) hours", PAGE.read_text())


OF_DELAY_2 = r"^\| (\d+) \+ (\d+) \| delay 2 \| (\d+) \| (\d+) \| \d+ \| (\d+) \|"
SPLITS = re.findall(OF_DELAY_2, (ROOT / "benchmarks" / "step_time.md").read_text(), re.MULTILINE)
# recipe, GPUs that train and that serve, the sentence about them, what the figure is rounded to
SENTENCES = [
    (qwen3_30b_a3b, 24, 40, r"expects ([\d,]+) s per step with responses", 1),
    (qwen3_30b_a3b, 32, 32, r"([\d,]+) s with 32 GPUs that train and 32 that serve", 1),
    (qwen3_30b_a3b, 16, 48, r"and ([\d,]+) s with 16 and 48", 1),
    (qwen3_8b, 8, 24, r"expects ([\d,]+) s per step with this split", 10),
    (qwen3_8b, 16, 16, r"([\d,]+) s with equal halves", 10),
]


def plan_of(recipe: str, trains: int = 0, serves: int = 0) -> Plan:
    """The plan of a recipe, with another split of its GPUs where one is given."""
    config = load_recipe(f"recipes.{recipe}")
    if trains:
        ranks = config.parallel.world_size // config.parallel.data_size
        split = [f"parallel.data={trains // ranks}", f"server.count={serves // config.server.tensor_parallel}"]
        config = with_overrides(config, split)
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


@pytest.mark.long
@pytest.mark.parametrize("place", range(3))
def test_the_record_of_a_steps_time_has_the_planners_figures(place: int) -> None:
    trains, serves, generation_s, training_s, step_s = map(int, SPLITS[place])
    plan = plan_of("qwen3_30b_a3b:minpro", trains, serves)
    training = plan.cost.score + plan.cost.train + plan.cost.publish
    assert (round(plan.generation_s), round(training), round(plan.step_s)) == (generation_s, training_s, step_s)


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "trains", "serves", "sentence", "rounding"), SENTENCES)
def test_the_recipes_sentences_have_the_planners_figures(
    recipe: ModuleType, trains: int, serves: int, sentence: str, rounding: int
) -> None:
    assert recipe.__doc__
    (written,) = re.findall(sentence, " ".join(recipe.__doc__.split()))
    plan = plan_of(f"{recipe.__name__.rpartition('.')[-1]}:minpro", trains, serves)
    assert rounding * round(plan.step_s / rounding) == int(written.replace(",", ""))


@pytest.mark.parametrize("recipe", [qwen3_30b_a3b, qwen3_8b, qwen3_14b], ids=lambda recipe: recipe.__name__)
def test_the_recipes_sentences_have_the_planners_kv_cache(recipe: ModuleType) -> None:
    config = recipe.minpro()
    memory = server_memory(config, find_architecture(config.model.hf_path), ClusterSize("h100-80gb", 1, 1).kind)
    text = " ".join((recipe.__doc__ or "").split())
    ((gigabytes, thousands),) = re.findall(r"(\d+) GB of KV cache \(\d+ kB per token: (\d+),000 tokens\)", text)
    assert round(memory.kv_tokens / 1000) == int(thousands)
    assert round(memory.kv_cache * config.server.tensor_parallel / 1e9) == int(gigabytes)
