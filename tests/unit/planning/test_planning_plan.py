"""Whole plans: problems and their remedies, the best split, step costs, and the tool that prints them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.commands import plan as tool
from minpro_megatron.config.run import with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.models.known_models.find import find_architecture
from minpro_megatron.planning.cost_model import Batch, Calibration, DecodingServer, TrainerCost
from minpro_megatron.planning.evaluations import ASSUMED_PROMPTS
from minpro_megatron.planning.gpus import gpu_kind
from minpro_megatron.planning.memory import server_memory, state_bytes
from minpro_megatron.planning.numbers import numbers
from minpro_megatron.planning.plan import ClusterSize, Plan, best_first, plan_run
from minpro_megatron.planning.workload import QUANTILES, GroupLengths, Workload, batch_of, response_quantiles
from tests.support.imports_of_files import PACKAGE, ROOT, imported_names
from tests.support.planned_runs import run_to_plan
from tests.support.rollout_fakes import write_rows

H100 = gpu_kind("h100-80gb")
SHORT = Workload(100, 500)
FITTING = ClusterSize("h100-80gb", trainer_gpus=16, server_gpus=8)


def planned(cluster: ClusterSize = FITTING, workload: Workload = SHORT, **settings: Any) -> Plan:
    return plan_run(run_to_plan(**settings), cluster, workload)


def test_a_run_that_fits_has_no_problem_and_all_numbers() -> None:
    plan = planned()
    assert plan.problems == []
    # a step is at least as long as either side's work
    assert plan.step_s >= max(plan.generation_s, plan.cost.score + plan.cost.train + plan.cost.publish)
    assert plan.step_s == pytest.approx(
        plan.wait_share * plan.step_s + plan.cost.score + plan.cost.train + plan.cost.publish, rel=0.05
    )
    found = json.loads(json.dumps(numbers(plan), allow_nan=False))
    assert (found["fits"], found["step"]["seconds"]) == (True, plan.step_s)
    assert found["ranks"][0]["total"] == plan.ranks[0].total


def test_an_evaluation_is_planned_with_its_share_and_its_delay() -> None:
    benchmark = {"name": "aime24", "file": "not here", "samples_per_prompt": 20}
    plan = planned(evaluation={"every_steps": 30, "num_prompts": 10, "benchmarks": [benchmark]}, num_global_steps=100)
    cost = plan.evaluation
    assert (cost.responses, cost.times) == (10 * 8 + 30 * 20, 5)
    assert cost.groups == 10 * -(-8 // plan.config.batch.responses_per_prompt) + 30 * -(
        -20 // plan.config.batch.responses_per_prompt
    )
    trained = 100 * plan.config.batch.num_prompts * plan.config.batch.responses_per_prompt
    assert cost.share_of_responses == pytest.approx(5 * cost.responses / (5 * cost.responses + trained))
    assert 0 < cost.added_s <= cost.seconds
    assert numbers(plan)["evaluation"]["responses"] == cost.responses
    assert (plan.step_s, plan.wait_share) == (planned().step_s, planned().wait_share)  # those of other steps


def test_a_benchmark_that_is_here_is_counted_and_the_size_of_others_is_assumed(tmp_path: Path) -> None:
    mine = {"name": "mine", "file": str(tmp_path / "mine.jsonl"), "samples_per_prompt": 1}
    unknown = planned(evaluation={"benchmarks": [mine]}).evaluation
    assert (unknown.responses, unknown.assumed) == (planned().evaluation.responses + ASSUMED_PROMPTS, ("mine",))
    rows = [{"id": str(i), "source": "s", "prompt": f"{i}?", "answer": "1"} for i in range(7)]
    write_rows(tmp_path / "mine.jsonl", rows)
    without = planned().evaluation.responses
    assert planned(evaluation={"benchmarks": [mine]}).evaluation.responses == without + 7
    assert planned(evaluation={"benchmarks": [mine | {"num_prompts": 3}]}).evaluation.responses == without + 3


def test_a_time_limit_that_the_longest_group_exceeds_is_reported() -> None:
    (problem,) = planned(server={"request_timeout_s": 2}).problems
    assert problem.startswith("server.request_timeout_s = 2 must be at least the ")
    longest = int(problem.partition("at least the ")[2].partition(" s ")[0])
    assert planned(server={"request_timeout_s": longest + 1}).problems == []


def test_too_little_memory_is_reported_with_changes_that_help() -> None:
    plan = planned(model={"recompute": "none"}, parallel={"context": 1, "data": 8})
    (problem,) = plan.problems
    assert problem.startswith("memory of a trainer rank of stage 0 = ")
    assert "must be at most the 84.8 GB of h100-80gb: set " in problem
    offered = problem.partition(": set ")[2].split(" or ")
    assert len(offered) == 3
    for change in offered:
        assignments = [part.replace(" ", "") for part in change.split(" and ")]
        changed = with_overrides(plan.config, assignments)
        assert plan_run(changed, FITTING, SHORT).problems == [], change


def test_no_single_change_helps_a_rank_that_is_far_too_small() -> None:
    (problem, *_) = planned(ClusterSize("cpu", 16, 8)).problems
    assert problem.endswith(": take more GPUs for the trainer and cut the model further")


def test_gpus_that_do_not_match_the_settings_are_reported_with_those_that_would() -> None:
    found = planned(ClusterSize("h100-80gb", trainer_gpus=32, server_gpus=16)).problems
    assert found == [
        "parallel: tensor x pipeline x context x data = 16 ranks must be as many as the trainer's GPUs = 32: set "
        "parallel.data = 8",
        "server.count x tensor_parallel = 8 must be as many as the servers' GPUs = 16: set server.count = 8",
    ]


def test_a_cache_too_small_for_one_response_is_reported() -> None:
    (problem,) = planned(server={"max_total_tokens": 5000}).problems
    assert problem.startswith("server: the KV cache of 5,000 tokens next to 30.5 GB of weights must hold")
    assert "9,216: raise server.tensor_parallel = 2 or server.max_total_tokens" in problem


def test_a_host_too_small_for_the_snapshots_is_reported() -> None:
    bounded = {"mode": "bounded", "max_staleness": 40}
    few = {"num_prompts": 4, "mini_batch_prompts": 4}
    (problem,) = planned(staleness=bounded, checkpoint={"every_steps": 0}, batch=few).problems
    assert problem.startswith("host memory of a node with 8 trainer ranks = ")
    assert "the largest part falls with a smaller bound or delay of staleness (" in problem


def test_the_best_split_is_found_and_given_as_settings() -> None:
    plan = planned(ClusterSize("h100-80gb", total_gpus=32))
    assert [(one.trainer_gpus, one.server_gpus) for one in plan.splits] != []
    assert {one.trainer_gpus + one.server_gpus for one in plan.splits} == {32}
    assert {one.trainer_gpus % 8 for one in plan.splits} == {0}  # whole nodes
    assert plan.splits == sorted(plan.splits, key=lambda one: one.step_s)
    again = with_overrides(run_to_plan(), plan.settings)
    best = plan.splits[0]
    fixed = plan_run(again, ClusterSize("h100-80gb", best.trainer_gpus, best.server_gpus), SHORT)
    assert (fixed.step_s, fixed.problems) == (plan.step_s, plan.problems)


@pytest.mark.parametrize(
    ("cluster", "settings", "message"),
    [
        ({"total_gpus": 4}, {}, "gpus = 4: no part of them can train: parallel.tensor x pipeline x context = 4 ranks"),
        ({"total_gpus": 32}, {"parallel": {"tensor": 3}}, "parallel.tensor = 3 must divide"),
        ({"total_gpus": 32}, {"model": {"hf_path": "/nowhere"}}, "model.hf_path = /nowhere: there is no config.json"),
        ({"total_gpus": 32, "gpu": "abacus"}, {}, "gpu = abacus: not known"),
        ({"total_gpus": 32, "trainer_gpus": 8, "server_gpus": 8}, {}, "give the first two, or the last alone"),
        ({"trainer_gpus": 8}, {}, "give the first two, or the last alone"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(cluster: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    parallel = {"expert": 1, "data": 4} if "parallel" in settings else {}
    config = run_to_plan(**{**settings, "parallel": parallel | settings.get("parallel", {})})
    with pytest.raises(ValueError, match=message):
        plan_run(config, ClusterSize(**cluster), SHORT)


def trainer_cost(**settings: Any) -> TrainerCost:
    config = run_to_plan(**settings)
    return TrainerCost(config, find_architecture(config.model.hf_path), H100, 8, Calibration())


def test_products_take_six_operations_a_parameter_and_token() -> None:
    batch = Batch([1000] * 4, num_sequences=128)
    cost = trainer_cost(model={"recompute": "none"}).step(batch)
    rate = 16 * 989e12 * 0.45
    # the rest is attention's quadratic part: 0.5 % at a thousand tokens
    assert cost.products == pytest.approx(6 * 3.04e9 * 128_000 / rate, rel=0.1)
    again = trainer_cost(model={"recompute": "full"}).step(batch)
    assert again.train > 1.25 * cost.train - cost.optimizer
    twice = trainer_cost(model={"recompute": "none"}, parallel={"data": 8}).step(batch)
    assert twice.products == pytest.approx(cost.products / 2)
    assert twice.routing == pytest.approx(cost.routing / 2)


def test_the_constant_for_routing_gives_back_the_measurement_it_is_from() -> None:
    """Megatron-Bridge 26.02: 5,113 tokens/s a GPU of Qwen3-30B-A3B in rows of 4,096 tokens on 16 H100."""
    cost = trainer_cost(
        model={"recompute": "none"}, parallel={"tensor": 1, "context": 1, "pipeline": 2, "expert": 8, "data": 8}
    ).step(Batch([4096], num_sequences=1024))
    busy = cost.products + cost.routing + cost.communication
    assert 1024 * 4096 / busy / 16 == pytest.approx(5113, rel=0.1)


def test_what_else_is_computed_costs_passes() -> None:
    batch = Batch([1000], num_sequences=128)
    plain = trainer_cost().step(batch)
    assert trainer_cost(loss={"kl": {"enabled": True}}).step(batch).train > plain.train
    assert trainer_cost(objective={"name": "m2po"}).step(batch).train > plain.train
    assert trainer_cost(staleness={"behavior_log_probs": "rollout"}).step(batch).score == 0
    bounded = trainer_cost(staleness={"mode": "bounded", "max_staleness": 2}).step(batch)
    assert bounded.score > plain.score
    pipeline = trainer_cost(parallel={"pipeline": 4, "data": 4}).step(batch)
    assert pipeline.bubble > 0 == plain.bubble
    assert trainer_cost(optimizer={"cpu_offload": 1.0}).step(batch).optimizer > plain.optimizer
    assert trainer_cost(publish={"transport": "disk"}).step(batch).publish > plain.publish
    slow = trainer_cost(checkpoint={"asynchronous": False}).step(batch)
    assert slow.checkpoint > plain.checkpoint > trainer_cost(checkpoint={"every_steps": 0}).step(batch).checkpoint == 0


def test_scoring_under_earlier_weights_swaps_them_in_and_out() -> None:
    batch = Batch([1000], num_sequences=128)
    delayed, on_policy = (trainer_cost(staleness={"delay_steps": n}).step(batch) for n in (2, 0))
    weights = state_bytes(run_to_plan(), find_architecture("qwen3-30b-a3b"), 0)[0]
    assert delayed.score - on_policy.score == pytest.approx(3 * weights / (64e9 * 0.6))


def test_axes_cost_what_they_send() -> None:
    """Of a dense model: 36 layers, hidden size 4,096, two bytes, over 75 % of 450 GB/s; across nodes of 50 GB/s."""
    batch, dense = Batch([1000], num_sequences=128), {"hf_path": "qwen3-8b"}
    alone = {"tensor": 1, "context": 1, "expert": 1, "data": 16}

    def sent(**axes: int) -> float:
        return trainer_cost(model=dense, parallel=alone | axes).step(batch).communication

    assert sent() == 0
    tokens = 128_000 / 4  # of each of four groups of tensor ranks
    assert sent(tensor=4, data=4) == pytest.approx(10 * 36 * tokens * 4096 * 2 * 3 / 4 / (0.75 * 450e9))
    keys = 2 * 8 * 128 * 2
    assert sent(context=2, data=8) == pytest.approx(3 * 36 * 128_000 / 16 * keys / (0.75 * 450e9))
    assert sent(context=16, data=1) == pytest.approx(3 * 36 * 128_000 / 16 * keys * 15 / (0.75 * 50e9))


def test_servers_of_somebody_else_are_counted_by_their_addresses() -> None:
    plan = planned(server={"urls": [f"http://10.0.0.{place}:30000" for place in range(3)]})
    assert (plan.num_servers, len(plan.timeline.busy), plan.problems) == (3, 3, [])


def server(**settings: Any) -> DecodingServer:
    config = run_to_plan(**settings)
    a = find_architecture(config.model.hf_path)
    return DecodingServer(config, a, H100, server_memory(config, a, H100), Calibration(), 4, mean_context=1000)


def test_a_single_response_reads_its_experts_and_many_read_all() -> None:
    one = server()
    # of two GPUs: half of 3.04 billion parameters in two bytes, at 60 % of 3.35 TB/s
    alone = 3.04e9 / (0.6 * 3.35e12) + 48 * (95e-6 + 2 * 12e-6)
    assert one.iteration_s(1, 0) == pytest.approx(alone, rel=0.02)
    everything = (30.53e9 - 0.31e9) / (0.6 * 3.35e12)
    assert one.iteration_s(500, 0) > everything > one.iteration_s(8, 0)
    cache = one.iteration_s(100, 1e5) - one.iteration_s(100, 0)
    assert cache == pytest.approx(1e5 * 49_152 / (0.6 * 3.35e12))


def test_published_decoding_of_a_dense_model_is_met() -> None:
    """Qwen3-14B in bfloat16, 8 responses of some 600 tokens: 7.16 ms a token on a B200 of 8 TB/s (ml.energy)."""
    b200 = replace(H100, name="b200", memory_bandwidth=8e12)
    config = run_to_plan(model={"hf_path": "qwen3-14b"}, server={"tensor_parallel": 1}, parallel={"expert": 1})
    a = find_architecture("qwen3-14b")
    found = DecodingServer(config, a, b200, server_memory(config, a, b200), Calibration(), 1, mean_context=600)
    assert found.iteration_s(8, 8 * 400) == pytest.approx(7.16e-3, rel=0.1)


def test_as_many_responses_run_as_the_cache_holds() -> None:
    assert server().max_running == 256
    assert server(server={"max_total_tokens": 20_000}).max_running == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {
                "data": {"demonstrations": "sft.jsonl"},
                "objective": {"name": "sft"},
                "batch": {"responses_per_prompt": 1},
                "staleness": {"delay_steps": 0},
            },
            "data.demonstrations = sft.jsonl: only runs that sample responses can be planned",
        ),
        (
            {"debug": {"journal": "runs/other"}},
            "debug.journal = runs/other: only runs that sample responses can be planned",
        ),
    ],
)
def test_runs_without_rollouts_of_their_own_are_not_planned(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_run(run_to_plan(**settings), ClusterSize("h100-80gb", 16, 8))


@pytest.mark.parametrize("mean", [50, 2000, 7000, 8192])
def test_response_lengths_have_the_mean_that_was_asked_for(mean: float) -> None:
    lengths = response_quantiles(Workload(100, mean), 8192)
    assert (len(lengths), lengths) == (QUANTILES, sorted(lengths))
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.01)
    assert max(lengths) <= 8192


def test_groups_lengths_are_the_same_every_time() -> None:
    config = run_to_plan()
    first, again = GroupLengths(config, SHORT), GroupLengths(config, SHORT)
    assert [first(group) for group in range(5)] == [again(group) for group in range(5)]
    assert len(first(0).responses) == 8
    assert batch_of(config, SHORT).tokens == pytest.approx(16 * 8 * 600, rel=0.01)


@pytest.mark.parametrize(("response", "prompt"), [(0.0, None), (9000.0, None), (None, 2000.0)])
def test_means_beyond_the_limits_are_refused(response: float | None, prompt: float | None) -> None:
    with pytest.raises(ValueError, match=r"mean (response|prompt) tokens = .* at most"):
        Workload.of(run_to_plan(), response, prompt)


def test_planning_needs_no_torch_in_whatever_it_imports() -> None:
    """A submitting machine may have none."""
    seen, left = set(), [ROOT / PACKAGE / "planning" / name for name in ("plan.py", "numbers.py")]
    while left:
        path = left.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for name in imported_names(path):
            assert name.partition(".")[0] not in ("torch", "megatron", "transformers"), f"{path} imports {name}"
            if name.startswith(f"{PACKAGE}."):
                left.append(ROOT / Path(*name.split(".")).with_suffix(".py"))
    assert len(seen) > 15


RECIPE = "recipes.demo:tiny_moe"
TINY = ["--gpu", "cpu", "--mean-response-tokens", "4", "--mean-prompt-tokens", "8"]


def tiny_model(folder: Path) -> str:
    config = {**json.loads((ROOT / PACKAGE / "models/known_models/qwen3-30b-a3b.json").read_text())}
    config |= {"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    return f"model.hf_path={folder}"


def test_the_tool_prints_tables_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model(tmp_path)
    assert tool.main([RECIPE, model, *TINY]) == 0
    printed = capsys.readouterr().out
    for part in (" thousand parameters", "memory of a trainer rank", "a global step", "4 updates", "fits"):
        assert part in printed
    assert tool.main([RECIPE, model, *TINY, "--gpus", "6", "--json", "--modes"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["splits"]) > 1
    assert found["run"] == "demo"
    on_policy, *others = found["modes"]
    assert (on_policy["mode"], on_policy["steps"]) == ("delay", 0)
    assert {mode["mode"] for mode in others} == {"delay", "bounded"}
    assert min(mode["step_s"] for mode in others) < on_policy["step_s"]


def test_the_tools_exit_status_says_whether_it_fits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model(tmp_path)
    assert tool.main([RECIPE, model, "server.max_total_tokens=8", *TINY]) == 1
    assert "does not fit: server: the KV cache of 8 tokens" in " ".join(capsys.readouterr().out.split())
    assert tool.main(["recipes.demo:nothing"]) == 2
    assert tool.main([RECIPE, "model.hf_path=/nowhere"]) == 2
    errors = capsys.readouterr().err
    assert "has no function 'nothing'" in errors
    assert "error: model.hf_path = /nowhere" in errors


def test_the_tool_draws_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assert tool.main([RECIPE, tiny_model(tmp_path), *TINY, "--json", "--picture", str(picture)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("best", [0, 1, 17, 30, 41, 62])
def test_of_many_splits_a_few_around_the_best_one_are_tried(best: int) -> None:
    tried: list[int] = []

    def step_s(split: int) -> float:
        tried.append(split)
        return abs(split - best) + 10.0

    found = best_first(range(63), step_s)
    assert found[0] == (10.0, best)
    assert [seconds for seconds, _ in found] == sorted(seconds for seconds, _ in found)
    assert len(tried) == len(set(tried)) < 20
    assert len(best_first(range(7), step_s)) == 7


def test_the_mean_step_has_its_share_of_evaluations_and_checkpoints() -> None:
    plan = planned(evaluation={"every_steps": 10}, checkpoint={"every_steps": 5}, num_global_steps=100)
    assert plan.evaluation.times == 11
    evaluations = 11 * plan.evaluation.added_s / 100
    assert plan.mean_step_s == pytest.approx(plan.step_s + evaluations + plan.cost.checkpoint / 5, rel=0.02)
    assert plan.mean_step_s > plan.step_s
