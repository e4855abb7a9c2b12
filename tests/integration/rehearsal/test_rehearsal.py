"""Ranks of the recipes, rehearsed at full width: no mismatch, the planner's memory, the expected collectives."""

import pytest

from minpro_megatron.launch.recipe import list_recipes
from minpro_megatron.rehearsal.record import RankRehearsal
from minpro_megatron.rehearsal.subject import CANARIES, PARK_STATES, PARK_WEIGHTS, RETURN, UPDATE
from tests.support.recipe_kinds import with_each_run
from tests.support.rehearsed_ranks import needs_transformer_engine, rehearse

pytestmark = [pytest.mark.integration, needs_transformer_engine]

MIXTURE = "recipes.qwen3_30b_a3b:minpro"
MODELS = ("recipes.qwen3_30b_a3b", "recipes.qwen3_14b", "recipes.qwen3_8b")
RECIPES = [line.split()[0] for model in MODELS for line in list_recipes(model)]
WHOLE = ("minpro", "minpro_one_machine", "minpro_one_machine_shared", "minpro_long_context")
MAX_ERROR = 0.05  # of the planner
# Where the host waits for the device in an update: Megatron's dispatcher reads the numbers of tokens of each expert,
# forward and recomputed, asynchronously; the project reads the statistics once and the gradient norm once.
UPDATE_READS = {"copy to host (asynchronous)", "copy to host", "item"}


def assert_planned(rank: RankRehearsal, *names: str, within: float = MAX_ERROR) -> None:
    components = {one.name: one for one in rank.components}
    for name in names:
        error = components[name].error
        assert error is not None
        assert abs(error) <= within, f"{rank.recipe} rank {rank.rank}, {name}: planned {error:+.1%}"


@pytest.mark.timeout(600)
def test_a_rank_of_the_mixture_with_two_layers() -> None:
    (rank,) = rehearse(MIXTURE, "--layers", "2")
    assert rank.problems == []
    assert_planned(rank, "weights", "gradients", "optimizer", "workspaces", "training", "building")
    assert_planned(rank, "publishing", "canaries", "host")
    (left,) = [one.measured for one in rank.components if one.name == "left after an update"]
    assert left < 0.02e9  # rotary angles, and values of the last micro-batch
    of_optimizer = [one for one in rank.collectives if one.phase == "update > optimizer"]
    gathers = {one.group.partition("[")[0]: one.count for one in of_optimizer if "gather" in one.name}
    assert gathers == {"data_parallel_group_with_cp": 1, "expert_data_parallel": 1}
    assert {one.device for one in rank.collectives if one.backend == "nccl"} == {"cuda"}
    reads = [one for one in rank.host_reads if one.phase == "update"]
    assert {one.kind for one in reads} == UPDATE_READS
    assert sum(one.count for one in reads if "asynchronous" not in one.kind) <= 4


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_dense_layer_on_four_tensor_ranks() -> None:
    """Its peak is in the backward pass of the second projection, where the gradients of all ranks are gathered."""
    (rank,) = rehearse("recipes.qwen3_14b:minpro_one_machine_shared", "--layers", "2")
    assert rank.problems == []
    # with so few layers the second bucket in the host's memory stays small
    assert_planned(rank, "activations' peak", "training", "building", "publishing", "canaries")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_rank_that_shares_its_gpu_moves_to_the_host_and_back() -> None:
    (rank,) = rehearse("recipes.qwen3_8b:minpro_one_machine_shared", "--layers", "2")
    assert rank.problems == []
    assert_planned(rank, "training", "building", "publishing", "canaries", "host")
    components = {one.name: one.measured for one in rank.components}
    phases = {one.name: one for one in rank.phases}
    stays, rest = components["workspaces"], 0.02e9  # rotary angles, and values of the last micro-batch
    with_weights = phases[PARK_STATES].left["cuda"]
    assert 0 <= with_weights - components["weights"] - stays < rest
    assert 0 <= phases[PARK_WEIGHTS].left["cuda"] - stays < rest
    # the rotary angles of the canaries, of 2,048 + 16 tokens, come in addition
    angles = (2048 + 16) * 128 * 4
    assert phases[RETURN].left["cuda"] - phases[UPDATE].left["cuda"] == angles
    assert 0 <= phases["update after the return"].peak["cuda"] - phases[UPDATE].peak["cuda"] <= angles
    moved = components["weights"] + components["optimizer"]
    assert phases[PARK_WEIGHTS].left["cpu"] - phases[UPDATE].left.get("cpu", 0) >= moved
    assert phases[CANARIES].entry["cuda"] == with_weights  # the buckets are in host memory


# Puts the labels on the host once megatron is imported, and rehearses.
PLANTED = """
import sys
from minpro_megatron.commands.rehearse import main
from minpro_megatron.rehearsal import rank

separate = rank._separate_log_probs

def plant(observer):
    from minpro_megatron.actor.forward import MicroBatch
    real = MicroBatch.tensor
    MicroBatch.tensor = lambda self, name: real(self, name).cpu() if name == "label_ids_S" else real(self, name)
    separate(observer)

rank._separate_log_probs = plant
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_planted_mismatch_is_reported_with_its_line() -> None:
    """The rest of the rehearsal is given up: nothing is compared with the planner."""
    (rank,) = rehearse("recipes.qwen3_8b:minpro", "--layers", "1", program=("-c", PLANTED))
    assert rank.components == []
    (problem,) = rank.problems
    assert problem.startswith("score > log-probs forward: FakeTensorDeviceMismatchError at parallel/log_probs.py:")
    assert "two devices, cuda:0 and cpu" in problem


@pytest.mark.long
@pytest.mark.timeout(3600)  # two ranks of five minutes each on an idle core
@pytest.mark.parametrize("recipe", with_each_run(RECIPES, objectives_of="recipes.qwen3_8b"))
def test_every_recipe(recipe: str) -> None:
    """At full depth what differs in memory or mesh, and two layers of what differs in the objective."""
    whole = recipe.rpartition(":")[2] in WHOLE
    for rank in rehearse(recipe, *("--all-kinds",) if whole else ("--layers", "2")):
        assert rank.problems == []
        if whole:
            assert_planned(rank, "training", "building", "canaries", "host")
        assert rank.process_peak_bytes < 10e9


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("settings", [["parallel.pipeline=4"], ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]])
def test_every_kind_of_stage(settings: list[str]) -> None:
    ranks = rehearse(MIXTURE, *settings, "parallel.data=4", "--all-kinds")
    assert len(ranks) >= 3
    for rank in ranks:
        assert rank.problems == []
        assert_planned(rank, "training", "building", "canaries", "host", within=0.1)
        assert "publish" in [phase.name for phase in rank.phases]
        if rank.rank == 0:
            assert_planned(rank, "publishing", within=0.1)


# A model of each family besides Qwen3, on a mesh that divides it, with nothing recomputed.
FAMILIES = {
    "qwen2.5-7b": ("parallel.tensor=4", "parallel.data=2"),
    "llama-3.1-8b": ("parallel.tensor=4", "parallel.data=2"),
    "glm-4.5-air": ("parallel.tensor=2", "parallel.context=2", "parallel.expert=8", "parallel.data=2"),
}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", FAMILIES)
def test_a_rank_of_another_family(model: str) -> None:
    settings = (f"model.hf_path={model}", "model.recompute=none", *FAMILIES[model])
    (rank,) = rehearse("recipes.qwen3_8b:minpro", *settings, "--layers", "3")
    assert rank.problems == []
    assert_planned(rank, "weights", "gradients", "optimizer", "training", "building", "publishing", "canaries")
