"""Plans of trainer and servers in turns on the same GPUs: memory at each moment, times, and the choice of placement."""

import math
from typing import Any

import pytest

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.models.known_models.find import find_architecture
from minpro_megatron.planning.activations import Row
from minpro_megatron.planning.canaries import canary_row
from minpro_megatron.planning.cluster_size import in_turns
from minpro_megatron.planning.gpus import GIB, gpu_kind
from minpro_megatron.planning.memory import host_memory, server_memory, state_bytes
from minpro_megatron.planning.numbers import numbers
from minpro_megatron.planning.plan import ClusterSize, Plan, plan_run
from minpro_megatron.planning.problems import stage_memories
from minpro_megatron.planning.turns import fitting_share, moving_times, turn_memory
from minpro_megatron.planning.workload import Workload
from minpro_megatron.report.plan_picture import PHASES
from tests.support.planned_runs import run_to_plan

H100 = gpu_kind("h100-80gb")
MIXTURE = find_architecture("Qwen/Qwen3-30B-A3B")
EIGHT = ClusterSize("h100-80gb", trainer_gpus=8, server_gpus=8)
SHORT = Workload(100, 500)


def shared(*changes: str, **sections: Any) -> RunConfig:
    """Eight GPUs that train, and that are two servers of four."""
    settings: dict[str, Any] = {
        "parallel": {"tensor": 4, "context": 2, "expert": 8, "data": 1},
        "server": {"placement": "shared", "tensor_parallel": 4, "count": 2, "memory_fraction": 0.6},
        "publish": {"transport": "shared_memory"},
        "optimizer": {"cpu_offload": 0.2},
    }
    return with_overrides(run_to_plan(**settings | sections), list(changes))


def planned(config: RunConfig, cluster: ClusterSize = EIGHT) -> Plan:
    return plan_run(config, cluster, SHORT)


def test_memory_of_every_moment() -> None:
    """From the parts: what both keep when they have moved or released their states, and what they have otherwise."""
    config = shared()
    ranks, server = stage_memories(config, MIXTURE), server_memory(config, MIXTURE, H100)
    (rank,) = ranks
    found = turn_memory(config, H100, ranks, server)
    weights = 30_532_122_624 * 2 // 4  # of a server's GPU
    assert server.weights == weights
    assert server.weights + server.kv_cache == pytest.approx(0.6 * 79 * GIB, rel=1e-4)
    running = 79 * GIB - 0.823 * 79 * GIB  # what SGLang leaves for activations and graphs by itself
    stays = rank.context + rank.workspaces
    assert found.training == rank.total + 3 * GIB
    assert found.receiving == stays + rank.weights + rank.publish + weights + 3 * GIB
    assert found.sampling == pytest.approx(stays + 0.6 * 79 * GIB + running, rel=1e-4)
    # Four prompts of 1,024 tokens with 16 more, each in two servers' ways: 8,320 tokens in one row, of which a rank has
    # an eighth. While an expert's second product is computed there are hidden states four times, the rows of 8 experts
    # as they are sent and, 1.3 times as many, received, sorted and as results, and three times an expert's width.
    hidden, rows = 1040 * 2048 * 2, 1.3 * 8 * 1040
    widths = 3 * 2048 + 3 * 768
    angles = (9216 + 1040) * 128 * 4
    routes = 1040 * (5 * 128 + 4 * 257)
    expected = 4 * hidden + 8 * hidden + rows * widths * 2 + angles + routes
    assert rank.canaries == pytest.approx(expected, rel=1e-4)
    assert found.canaries == found.sampling + rank.weights + rank.canaries
    no_canaries = stage_memories(shared("publish.canary_tokens=0"), MIXTURE)
    assert turn_memory(config, H100, no_canaries, server).canaries == found.sampling + rank.weights
    assert found.largest == max(found.training, found.canaries)


def test_canaries_of_many_servers_fill_several_rows() -> None:
    """The longest row counts; of equal sequences, as many as fit into it or as a rank's share has."""
    longest = {
        changes: canary_row(with_overrides(shared(), list(changes)), MIXTURE)
        for changes in [
            (),
            ("publish.canary_tokens=0",),
            ("server.count=20", "server.placement=disaggregated"),
            ("parallel.tensor=2", "parallel.data=2"),
        ]
    }
    assert list(longest.values()) == [
        Row(8 * 1040, 1040),
        None,
        # 80 sequences in three rows, with five of padding (four tokens each) beside 27, and the row's own padding
        Row(27 * 1040 + 5 * 4 + 12, 1040),
        Row(4 * 1040, 1040),
    ]


def test_the_largest_share_for_servers_is_the_one_that_is_offered() -> None:
    share = fitting_share(shared(), H100, stage_memories(shared(), MIXTURE))
    assert planned(shared(f"server.memory_fraction={share}")).problems == []
    (problem,) = planned(shared(f"server.memory_fraction={share + 0.01}")).problems
    assert problem.startswith(
        "server.placement = shared: memory of a GPU while servers generate canaries and the train"
    )
    assert f"must be at most the 84.8 GB of h100-80gb: set server.memory_fraction = {share:g}, or" in problem
    # SGLang's own share leaves nothing for another process
    assert len(planned(shared("server.memory_fraction=null")).problems) >= 1


def test_a_trainer_beside_released_servers_must_fit() -> None:
    """It would fit alone."""
    config = shared("optimizer.cpu_offload=0", parallel={"tensor": 2, "context": 2, "expert": 8, "data": 2})
    (rank,) = stage_memories(config, MIXTURE)
    (problem,) = [one for one in planned(config).problems if "the trainer trains" in one]
    assert rank.total < H100.memory_bytes < rank.total + 3 * GIB
    for change in problem.partition(": set ")[2].split(" or "):
        changed = with_overrides(config, [part.replace(" ", "") for part in change.split(" and ")])
        assert not [one for one in planned(changed).problems if "the trainer trains" in one], change


def test_states_move_over_every_gpus_own_link() -> None:
    config = shared()
    weights, _, optimizer, on_host = state_bytes(config, MIXTURE, 0)
    assert on_host > 0  # stays where it is
    seconds = (weights + optimizer) / (64e9 * 0.6)
    assert moving_times(config, MIXTURE, H100, 0.6) == (pytest.approx(seconds), pytest.approx(seconds))
    assert moving_times(run_to_plan(), MIXTURE, H100, 0.6) == (0.0, 0.0)
    plan, alone = planned(config), planned(shared("server.placement=disaggregated"))
    assert plan.cost.moving == pytest.approx(2 * seconds)
    assert plan.cost.release == pytest.approx(seconds + 2)
    assert plan.cost.publish - alone.cost.publish == pytest.approx(seconds + 2)
    assert (alone.cost.moving, alone.cost.release, alone.turns) == (0.0, 0.0, None)


def test_the_host_holds_the_states_and_no_earlier_weights() -> None:
    config = shared()
    weights, _, optimizer, _ = state_bytes(config, MIXTURE, 0)
    found = host_memory(config, MIXTURE, ranks_per_node=8, batch_tokens=1e6)
    assert (found.parked, found.snapshots) == (8 * (weights + optimizer), 0)
    assert host_memory(shared("loss.kl.enabled=true"), MIXTURE, 8, 1e6).snapshots == 2 * 8 * weights
    assert host_memory(run_to_plan(), MIXTURE, 8, 1e6).parked == 0


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_a_step_is_the_sum_of_both_sides_work(delay: int) -> None:
    """None of it overlaps."""
    plan = planned(shared(f"staleness.delay_steps={delay}"))
    cost = plan.cost
    waits = plan.wait_share * plan.step_s
    assert plan.step_s == pytest.approx(waits + cost.score + cost.train + cost.publish + cost.release, rel=0.02)
    assert waits == pytest.approx(plan.generation_s, rel=0.15)  # of batches with other lengths
    assert 0 <= plan.idle_share - (1 - plan.wait_share) < 0.1  # one server has longer responses than the other
    assert {span.phase for span in plan.timeline.spans} <= set(PHASES)
    found = numbers(plan)
    assert found["turns"]["training"] == plan.turns.training if plan.turns else False
    assert found["step"]["release"] == cost.release


def test_the_faster_placement_is_found_and_given_as_settings() -> None:
    """For eight GPUs, starting from settings of either placement; one share of them for each kind of split."""
    cluster = ClusterSize("h100-80gb", total_gpus=8)
    apart = run_to_plan(
        parallel={"tensor": 2, "context": 2, "expert": 4, "data": 1}, optimizer={"cpu_offload": 1.0}, batch={}
    )
    plan = planned(apart, cluster)
    kinds = {one.in_turns: one for one in reversed(plan.splits)}
    assert set(kinds) == {True, False}
    assert (kinds[True].trainer_gpus, kinds[True].server_gpus) == (8, 8)
    assert plan.splits == sorted(plan.splits, key=lambda one: one.step_s)
    assert plan.splits[0].in_turns == plan.config.server.takes_turns
    again = with_overrides(apart, plan.settings)
    served = again.server.count * again.server.tensor_parallel
    fixed = planned(again, ClusterSize("h100-80gb", again.parallel.world_size, served))
    assert (fixed.step_s, fixed.problems) == (plan.step_s, plan.problems)
    together = planned(shared(), cluster)
    assert [one.in_turns for one in together.splits] == [True]
    assert together.config.server.memory_fraction == 0.6  # the settings' own
    assert math.isfinite(together.step_s)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (run_to_plan(staleness={"mode": "bounded"}), 8),  # the servers never stop
        (run_to_plan(server={"urls": ["http://a:1"], "count": 1}), 8),
        (run_to_plan(), 16),  # two machines
        (run_to_plan(), 6),  # the mesh has 4 ranks
        (shared(), 4),  # and 8
    ],
)
def test_turns_are_offered_only_where_they_are_possible(config: RunConfig, total: int) -> None:
    assert in_turns(config, ClusterSize("h100-80gb", total_gpus=total)) is None
