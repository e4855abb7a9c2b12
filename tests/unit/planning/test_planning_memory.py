"""What the planner says of memory, against the table of weights, known figures and sums by hand."""

from dataclasses import replace
from typing import Any

import pytest

from minpro_megatron.config.model import RecomputedModule
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import with_overrides
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.models.known_models.find import find_architecture, known_names
from minpro_megatron.planning.activations import (
    Compute,
    Row,
    layer_activations,
    logit_bytes,
    stage_activations,
)
from minpro_megatron.planning.gpus import GIB, GPU_KINDS, gpu_kind
from minpro_megatron.planning.memory import (
    host_memory,
    publish_bytes,
    rank_memory,
    server_memory,
    shared_bucket_bytes,
    state_bytes,
)
from minpro_megatron.planning.parameters import active_parameters, model_parameters, stage_parameters
from minpro_megatron.planning.problems import largest_rank, least_recomputation, stage_memories
from minpro_megatron.planning.routes import route_file_bytes
from minpro_megatron.weights.plan import rank_kinds
from tests.support.planned_runs import run_to_plan

MIXTURE = find_architecture("Qwen/Qwen3-30B-A3B")
DENSE = find_architecture("qwen3-8b")
GPU = Compute("cuda", 2, fused=True, recompute="none", expert_imbalance=1.0)


@pytest.mark.parametrize(
    "degrees",
    [
        {},
        {"tensor": 4, "pipeline": 2, "context": 2},
        {"tensor": 8, "data": 2},
        {"pipeline": 4, "virtual_pipeline": 2},
        {"tensor": 2, "expert": 4, "expert_tensor": 2, "data": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen3-0.6b", "qwen2.5-7b", "llama-3.2-1b", "glm-4.5"])
def test_every_stage_holds_what_the_table_of_weights_says(name: str, degrees: dict[str, Any]) -> None:
    a = replace(find_architecture(name), num_layers=8)  # the table has a row for each of 128 experts in every layer
    if not a.num_experts:
        degrees = {axis: degree for axis, degree in degrees.items() if not axis.startswith("expert")}
        degrees |= {"virtual_pipeline": 1}
    parallel = ParallelConfig(**degrees)
    for kind in rank_kinds(a, parallel):
        for stage in kind.stages:
            found = stage_parameters(a, parallel, stage)
            assert (found.total, found.experts, found.layers) == (kind.parameters, kind.expert_parameters, kind.layers)


def test_the_known_figures_of_the_released_mixture() -> None:
    assert model_parameters(MIXTURE) == 30_532_122_624
    assert active_parameters(MIXTURE) / 1e9 == pytest.approx(3.34 - 0.31, abs=0.02)  # 3.3 with the embedding
    config = run_to_plan(parallel={"tensor": 1, "context": 1, "expert": 1, "data": 1})
    weights, gradients, optimizer, on_host = state_bytes(config, MIXTURE, 0)
    assert weights == pytest.approx(61.06e9, rel=1e-3)
    assert weights + gradients + optimizer == pytest.approx(549.6e9, rel=1e-3)
    assert on_host == 0


def test_states_are_cut_and_moved_to_the_host_as_settings_say() -> None:
    whole = run_to_plan(parallel={"tensor": 2, "context": 2, "expert": 8, "data": 4})
    weights, gradients, optimizer, _ = state_bytes(whole, MIXTURE, 0)
    held = stage_parameters(MIXTURE, whole.parallel, 0)
    assert (weights, gradients) == (2 * held.total, 4 * held.total)
    # dense states over data x context = 8 ranks, experts' over tensor x context x data / expert = 2
    assert optimizer == pytest.approx(12 * (held.dense / 8 + held.experts / 2), abs=24)
    half = run_to_plan(optimizer={"cpu_offload": 0.5})
    _, _, on_device, on_host = state_bytes(half, MIXTURE, 0)
    assert on_device == pytest.approx(optimizer / 2, abs=2)
    assert on_host == pytest.approx(optimizer / 2 * 16 / 12, abs=2)


def test_float32_weights_are_their_own_main_copy() -> None:
    config = run_to_plan(device="cpu", model={"dtype": "float32"}, parallel={"tensor": 1, "context": 1, "expert": 1})
    config = config.model_copy(update={"parallel": ParallelConfig(data=1)})
    weights, _, optimizer, _ = state_bytes(config, DENSE, 0)
    assert optimizer == 2 * weights


def test_a_dense_layers_activations_by_hand() -> None:
    """Qwen3-8B, 1,024 tokens, bfloat16, nothing cut."""
    layer = layer_activations(DENSE, ParallelConfig(), Row(1024, 1024), GPU, mixture=False)
    residual_and_norms = 4 * 4096
    attention = 1024 + 2 * (4096 + 1024) + 4096  # values, norm inputs, rotated, output
    feed_forward = 3 * 12288  # gate, up and their product
    statistics = 32 + 32 + 8  # softmax, norms of 32 query and 8 key heads; float32
    assert layer.kept == 1024 * (2 * (residual_and_norms + attention + feed_forward) + 4 * statistics)
    assert layer.inputs == 1024 * 4096 * 2
    assert layer.routed == 0


def test_a_mixtures_rows_by_hand() -> None:
    """Qwen3-30B-A3B on 8 expert ranks: as many rows arrive as are sent, times the imbalance."""
    row, parallel = Row(4096, 4096), ParallelConfig(expert=8)
    balanced = layer_activations(MIXTURE, parallel, row, GPU, mixture=True)
    assert balanced.routed == 4096 * 8 * (2048 + 3 * 768) * 2
    uneven = Compute("cuda", 2, fused=True, recompute="none", expert_imbalance=1.5)
    assert layer_activations(MIXTURE, parallel, row, uneven, mixture=True).routed == 1.5 * balanced.routed
    alone = layer_activations(MIXTURE, ParallelConfig(), row, uneven, mixture=True)
    assert alone.routed == balanced.routed  # one rank gets all rows, whoever they are for


def test_recomputation_keeps_less() -> None:
    row, parallel = Row(8192, 8192), ParallelConfig(pipeline=2)

    def saved(recompute: str, stage: int = 0) -> int:
        compute = Compute("cuda", 2, fused=False, recompute=recompute, expert_imbalance=1.0)
        return stage_activations(DENSE, parallel, row, 8, compute, stage).saved

    assert saved("full") < saved("selective") < saved("none")
    hidden = 8192 * 4096 * 2
    # two micro-batches in flight, 18 layers' inputs each, the last one's output, and what the next stage exchanges
    assert saved("full") == 2 * 18 * hidden + hidden + 2 * hidden


def test_some_layers_or_some_parts_can_be_recomputed() -> None:
    row, hidden = Row(8192, 8192), 8192 * 2048 * 2

    def saved(recompute: str, modules: tuple[RecomputedModule, ...] = (), layers: int = 0) -> int:
        compute = Compute("cuda", 2, True, recompute, 1.0, modules, layers)
        return stage_activations(MIXTURE, ParallelConfig(), row, 8, compute, 0).saved

    kept, inputs = ((saved("none") - saved("full")) / 48 + hidden, hidden)
    assert saved("full", layers=12) == saved("none") - 12 * (kept - inputs)
    assert saved("full", layers=99) == saved("full")
    # per layer: the second norm's output, and the activations of 8 experts of width 768 for each token
    assert saved("none") - saved("selective", ("layernorm",)) == 48 * hidden
    assert saved("none") - saved("selective", ("moe_act",)) == 48 * 8192 * 8 * 768 * 2
    assert saved("selective") == saved("selective", ("moe_act", "layernorm"))
    dense = Compute("cuda", 2, True, "selective", 1.0)
    whole = layer_activations(DENSE, ParallelConfig(), row, replace(dense, recompute="none"), mixture=False)
    without_mlp = layer_activations(DENSE, ParallelConfig(), row, dense, mixture=False)
    assert whole.kept - without_mlp.kept == (3 * 12288 + 4096) * 8192 * 2
    assert without_mlp.backward - whole.backward == whole.kept - without_mlp.kept


def test_the_planner_names_the_least_recomputation_that_fits() -> None:
    config, roomy = run_to_plan(), 10**15
    assert least_recomputation(config, MIXTURE, roomy) == "model.recompute = none"
    assert least_recomputation(config, MIXTURE, 0) == ""
    limit = largest_rank(stage_memories(with_overrides(config, ["model.recompute_layers=20"]), MIXTURE)).total
    assert least_recomputation(config, MIXTURE, limit) == "model.recompute_layers = 20"
    assert least_recomputation(with_overrides(config, ["model.recompute_layers=20"]), MIXTURE, limit) == ""


@pytest.mark.parametrize(
    ("degrees", "micro_batches", "in_flight"),
    [
        ({"pipeline": 4}, 16, [4, 3, 2, 1]),
        ({"pipeline": 4}, 2, [2, 2, 2, 1]),
        ({"pipeline": 2, "virtual_pipeline": 2}, 16, [2.5, 1.5]),  # warm-up 4 and 2 runs of layers, and one more
    ],
    ids=str,
)
def test_earlier_stages_hold_more_micro_batches(
    degrees: dict[str, Any], micro_batches: int, in_flight: list[float]
) -> None:
    parallel = ParallelConfig(**degrees)
    found = [
        stage_activations(DENSE, parallel, Row(1024, 1024), micro_batches, GPU, stage).micro_batches
        for stage in range(parallel.pipeline)
    ]
    assert found == in_flight


def test_logits_are_a_block_and_the_output_layers_gradient() -> None:
    parallel = ParallelConfig(tensor=4)
    found = logit_bytes(MIXTURE, parallel, Row(32768, 32768), GPU)
    block, columns, hidden = 8192 * 8192, 151_936 // 4, 2048
    assert found == 6 * block + 4 * columns * hidden + 6 * 8192 * hidden + 2 * 32768 // 4 * hidden
    assert logit_bytes(MIXTURE, parallel, Row(65536, 65536), GPU) - found == 2 * 32768 // 4 * hidden


def test_a_server_holds_weights_and_as_many_tokens_as_are_left() -> None:
    config = run_to_plan()
    memory = server_memory(config, MIXTURE, gpu_kind("h100-80gb"))
    assert memory.weights == pytest.approx(30.53e9, rel=1e-3)
    assert memory.kv_bytes_per_token == 2 * 48 * 2 * 128 * 2  # keys and values, layers, 2 of 4 heads, width, bytes
    assert memory.kv_tokens == int(0.827 * 79 * GIB - memory.weights) // memory.kv_bytes_per_token
    half = server_memory(run_to_plan(server={"memory_fraction": 0.5}), MIXTURE, gpu_kind("h100-80gb"))
    assert half.kv_tokens == int(0.5 * 79 * GIB - memory.weights) // memory.kv_bytes_per_token
    fewer = server_memory(run_to_plan(server={"max_total_tokens": 10_000}), MIXTURE, gpu_kind("h100-80gb"))
    assert fewer.kv_tokens == 10_000
    shared = server_memory(run_to_plan(server={"tensor_parallel": 8}), MIXTURE, gpu_kind("h100-80gb"))
    assert shared.kv_bytes_per_token == 2 * 48 * 128 * 2  # four key heads for eight GPUs: one each, twice over
    assert server_memory(run_to_plan(server={"tensor_parallel": 1}), DENSE, gpu_kind("cpu")).kv_tokens == 0


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"staleness": {"delay_steps": 0}}, 1),
        ({"staleness": {"delay_steps": 2}}, 2),
        ({"staleness": {"delay_steps": 4}, "loss": {"kl": {"enabled": True}}}, 3),
        ({"staleness": {"mode": "bounded", "max_staleness": 3}}, 5),
    ],
    ids=str,
)
def test_the_host_keeps_a_copy_of_each_version_that_may_be_scored(settings: dict[str, Any], copies: int) -> None:
    config = run_to_plan(**settings)
    weights, _, optimizer, _ = state_bytes(config, MIXTURE, 0)
    found = host_memory(config, MIXTURE, ranks_per_node=8, batch_tokens=1e6)
    assert found.snapshots == 8 * copies * weights
    # of the parameters that a rank updates: bfloat16 weights beside the 12 bytes of the optimizer's states
    assert found.checkpoint == 8 * optimizer * 14 // 12
    assert found.routes == 0


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({"staleness": {"delay_steps": 2}}, 3 + 10 + 1),
        ({"staleness": {"delay_steps": 0}, "checkpoint": {"every_steps": 4}}, 1 + 4 + 1),
        ({"staleness": {"mode": "bounded", "max_staleness": 3}, "publish": {"pause_mode": "abort"}}, 4 + 10 + 1),
        ({"staleness": {"delay_steps": 2}, "checkpoint": {"every_steps": 0}}, 3 + 1),
        ({"staleness": {"delay_steps": 2}, "collector": {"journal_keep_routes": True}}, 3 + 50),
        ({"checkpoint": {"every_steps": 0, "every_minutes": 60}, "num_global_steps": 80}, 3 + 80),
        ({"collector": {"journal_keep_routes": True, "journal_keep_steps": 0}, "num_global_steps": 80}, 3 + 80),
        ({"collector": {"journal_keep_routes": True}, "num_global_steps": 30}, 3 + 30),
    ],
    ids=str,
)
def test_routes_of_the_servers_take_disk_until_a_checkpoint_includes_the_step(
    settings: dict[str, Any], batches: int
) -> None:
    config = run_to_plan(model={"routing_replay": "rollout"}, **settings)
    assert route_file_bytes(config, MIXTURE, 1e6) == batches * 1e6 * 48 * 8
    of_a_node = 1e6 * 48 * 8 * 8 / config.parallel.world_size  # while a batch is scored
    assert host_memory(config, MIXTURE, ranks_per_node=8, batch_tokens=1e6).routes == of_a_node


def test_buckets_are_in_shared_memory_or_on_the_gpus() -> None:
    config = run_to_plan()
    shared = with_overrides(config, ["publish.transport=shared_memory"])
    largest = 151936 * 2048 * 2  # the embedding in bfloat16, larger than publish.bucket_bytes
    assert host_memory(config, MIXTURE, ranks_per_node=8, batch_tokens=1e6).buckets == 0
    assert host_memory(shared, MIXTURE, ranks_per_node=8, batch_tokens=1e6).buckets == 2 * largest
    saved = publish_bytes(config, MIXTURE, 0) - publish_bytes(shared, MIXTURE, 0)
    assert saved == largest + config.publish.bucket_bytes
    tiny = replace(MIXTURE, num_layers=1, num_experts=0, vocab_size=1000)
    assert shared_bucket_bytes(shared, tiny) == 2 * 2 * model_parameters(tiny)


def test_kept_ids_take_disk_as_routes_do_and_memory_of_the_last_stage() -> None:
    settings = {"sampling": {"top_k": 50}, "parallel": {"tensor": 4, "context": 2, "pipeline": 2, "expert": 8}}
    config = run_to_plan(**settings)
    of_batch = 1e6 * 4 * 51  # the ids and their number
    assert route_file_bytes(config, MIXTURE, 1e6) == (3 + 10 + 1) * of_batch
    of_node = 8 * of_batch / (2 * config.parallel.data_size)  # every tensor rank has those of its context shard
    assert host_memory(config, MIXTURE, ranks_per_node=8, batch_tokens=1e6).routes == round(of_node)
    both = run_to_plan(**settings, model={"routing_replay": "rollout"})
    assert route_file_bytes(both, MIXTURE, 1e6) == (3 + 10 + 1) * (of_batch + 1e6 * 48 * 8)
    without = run_to_plan(parallel=settings["parallel"])

    def logits(one: Any, stage: int) -> int:
        return rank_memory(one, MIXTURE, Row(32768, 9216), 4, stage, 1.3).activations.logits

    # int32 for the row, three int64 for a chunk of 8,192 tokens, and a bool for each logit of a block
    added = (16384 * 4 + 8192 * 24) * 50 // 4 + 8192 * 8192
    assert [logits(config, stage) - logits(without, stage) for stage in (0, 1)] == [0, added]


def test_recorded_routes_take_host_memory_while_a_batch_waits() -> None:
    config = run_to_plan(model={"routing_replay": "scored"}, checkpoint={"every_steps": 0})
    assert config.staleness.delay_steps == 2
    assert route_file_bytes(config, MIXTURE, 1e6) == 0
    found = host_memory(config, MIXTURE, ranks_per_node=8, batch_tokens=1e6).routes
    assert found == 3 * 1e6 * 48 * 8 * 8 / config.parallel.world_size


def test_a_checkpoints_copy_is_that_of_the_ranks_own_states() -> None:
    """Whatever the data-parallel degree, and wherever the states are; none where the ranks wait for the files."""
    mesh = {"tensor": 2, "context": 2, "expert": 8}

    def copy(data: int, **settings: Any) -> int:
        config = run_to_plan(parallel=mesh | {"data": data}, **settings)
        return host_memory(config, MIXTURE, ranks_per_node=8, batch_tokens=1e6).checkpoint

    assert copy(8) == pytest.approx(copy(4) / 2, rel=1e-6)
    assert copy(4) == copy(4, optimizer={"cpu_offload": 1.0}) == pytest.approx(14 * 30.6e9 / 2, rel=0.02)
    assert copy(4, checkpoint={"asynchronous": False}) == copy(4, checkpoint={"every_steps": 0, "at_end": False}) == 0


def test_a_ranks_total_counts_publication_apart_from_training() -> None:
    rank = rank_memory(run_to_plan(), MIXTURE, Row(32768, 9216), 4, 0, 1.3)
    parts = rank.states + rank.workspaces + rank.activations.peak + rank.context + rank.fragments
    assert rank.total == parts
    large = rank_memory(run_to_plan(publish={"bucket_bytes": 40 * GIB}), MIXTURE, Row(32768, 9216), 4, 0, 1.3)
    assert large.total == parts - rank.activations.peak + large.publish


def test_transformer_engine_keeps_workspaces_and_a_gradient_of_each_shape() -> None:
    row, no_sums = Row(32768, 9216), {"megatron": {"gradient_accumulation_fusion": False}}
    mesh = {"tensor": 2, "context": 2, "expert": 8}

    def kept(a: Architecture, **model: Any) -> int:
        return rank_memory(run_to_plan(parallel=mesh, model=model), a, row, 4, 0, 1.3).workspaces

    assert kept(MIXTURE, **no_sums) == 5 * kept(DENSE, **no_sums) == 5 * (32 * 2**20 + 1024)
    # joint projection of 32 and 2 x 4 heads of 128, output projection, gate and up projection, down projection
    shapes = [(2560, 2048), (2048, 2048), (2 * 768, 2048), (2048, 768)]
    assert kept(MIXTURE) - kept(MIXTURE, **no_sums) == 2 * sum(rows * columns for rows, columns in shapes)
    assert kept(DENSE, backend="torch") == 0


def test_building_holds_the_originals_of_what_is_being_copied() -> None:
    config = run_to_plan(parallel={"tensor": 2, "context": 2, "expert": 8, "data": 8})
    held = stage_parameters(MIXTURE, config.parallel, 0)
    rank = rank_memory(config, MIXTURE, Row(32768, 9216), 4, 0, 1.3)
    assert rank.building == rank.weights + rank.gradients + 2 * held.experts
    dense = rank_memory(run_to_plan(parallel={"expert": 1}), DENSE, Row(32768, 9216), 4, 0, 1.3)
    assert dense.building == 2 * dense.weights + dense.gradients
    few = run_to_plan(parallel={"tensor": 2, "context": 2, "expert": 8, "data": 2})  # many states on each rank
    rank = rank_memory(few, MIXTURE, Row(32768, 9216), 4, 0, 1.3)
    assert rank.building == pytest.approx(rank.weights + rank.gradients + rank.optimizer / 3, abs=8)


def test_publishing_holds_two_buffers_and_the_next_bucket_in_shards_and_whole() -> None:
    bucket = 512 << 20
    mixture, embedding = run_to_plan(parallel={"tensor": 2}), 151_936 * 2048 * 2  # a bucket of its own
    assert embedding > bucket
    assert publish_bytes(mixture, MIXTURE, 0) == embedding + bucket + embedding // 2 + embedding
    assert publish_bytes(run_to_plan(parallel={"tensor": 1}), MIXTURE, 0) == 2 * embedding
    pipeline = run_to_plan(parallel={"tensor": 2, "pipeline": 2})
    assert publish_bytes(pipeline, MIXTURE, 0) == 3 * embedding + bucket
    assert publish_bytes(pipeline, MIXTURE, 1) == embedding // 2  # what it sends
    small = find_architecture("qwen3-0.6b")
    assert publish_bytes(mixture, small, 0) == int(3.5 * bucket)


def test_every_kind_of_gpu_has_figures_and_a_source() -> None:
    for kind in GPU_KINDS.values():
        assert len(kind.source) > 20
        assert min(value for value in vars(kind).values() if not isinstance(value, str)) > 0
    with pytest.raises(ValueError, match=r"gpu = h300: not known; known: h100-80gb, .*; add it"):
        gpu_kind("h300")


def test_known_models_are_found_by_name_and_others_refused(tmp_path: Any) -> None:
    assert find_architecture("/models/Qwen3-14B-Base/hf") == find_architecture("Qwen/Qwen3-14B")
    assert model_parameters(find_architecture("qwen3-14b")) == 14_768_307_200
    assert {"qwen3-30b-a3b", "qwen3-8b", "qwen3-14b"} <= set(known_names())
    with pytest.raises(ValueError, match=r"model.hf_path = .*mine: there is no config.json here.*known: .*qwen3-8b"):
        find_architecture(str(tmp_path / "mine"))
