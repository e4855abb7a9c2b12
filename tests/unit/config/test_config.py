"""The settings: JSON and back, overrides, and refusals that name field, value and rule."""

import json
import re

import pytest
from pydantic import ValidationError

from minpro_megatron.config.objective import CispoConfig, GrpoConfig, MinproConfig
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.recipes.demo import tiny_moe, tiny_moe_cispo, tiny_moe_smoke
from tests.support.run_examples import example_config


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return example_config(tmp_path)


def refusal(config: RunConfig, *assignments: str) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        with_overrides(config, list(assignments))
    return str(caught.value)


def test_settings_survive_json(config):
    changed = with_overrides(
        config, ["objective.name=cispo", "server.max_total_tokens=4096", "optimizer.learning_rate=1e-7"]
    )
    assert RunConfig.from_json(changed.to_json()) == changed
    assert isinstance(RunConfig.from_json(changed.to_json()).objective, CispoConfig)


def test_settings_cannot_be_changed_after_their_checks(config):
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.batch.num_prompts = 1


@pytest.mark.parametrize(
    ("assignment", "section", "key", "value"),
    [
        ("seed=7", None, "seed", 7),
        ("name=other", None, "name", "other"),
        ("optimizer.learning_rate=1e-5", "optimizer", "learning_rate", 1e-5),
        ("batch.packing=false", "batch", "packing", False),
        ("server.max_total_tokens=null", "server", "max_total_tokens", None),
        ("data.train_file=a=b.jsonl", "data", "train_file", "a=b.jsonl"),
        ("objective.clip_high=2", "objective", "clip_high", 2.0),
    ],
)
def test_an_override_changes_one_setting(config, assignment, section, key, value):
    changed = with_overrides(config, [assignment])
    assert getattr(getattr(changed, section) if section else changed, key) == value
    expected = config.model_dump()
    (expected[section] if section else expected)[key] = value
    assert changed.model_dump() == expected


def test_overrides_are_checked_together(config):
    changed = with_overrides(config, ["batch.num_prompts=9", "batch.mini_batch_prompts=3"])
    assert changed.batch.updates_per_step == 3
    assert "must be a multiple" in refusal(config, "batch.num_prompts=9")


def test_another_objective_starts_from_its_own_defaults(config):
    narrow = config.model_copy(update={"objective": MinproConfig(clip_high=0.5)})
    assert with_overrides(narrow, ["objective.name=cispo"]).objective == CispoConfig()
    assert with_overrides(narrow, ["objective.name=minpro"]).objective == MinproConfig(clip_high=0.5)


def test_another_objective_and_its_settings_can_be_given_together(config):
    changed = with_overrides(config, ["objective.name=grpo", "objective.clip_high=0.3"])
    assert changed.objective == GrpoConfig(clip_high=0.3)


def test_a_name_that_looks_like_a_number_stays_a_name(config):
    assert with_overrides(config, ["name=2024"]).name == "2024"


@pytest.mark.parametrize(
    ("assignments", "pattern"),
    [
        (["seed"], "override 'seed': expected section.key=value"),
        (["seeds=1"], "override 'seeds=1': there is no setting 'seeds' .did you mean seed.*; known: name, .*seed"),
        (["optimiser.beta1=0"], "there is no section 'optimiser' .did you mean optimizer.*; known: .*optimizer"),
        (["optimizer.beta3=0"], "there is no setting 'beta3' .did you mean beta.*; known: .*beta2"),
        (["name.x=0"], "there is no section 'name'"),
        (["seed=-1"], r"^seed: .*greater than or equal to 0 \(got -1\)$"),
        (["optimizer.learning_rate=-1"], r"^optimizer.learning_rate: .*greater than or equal to 0 \(got -1\)$"),
        (["optimizer.learning_rate=NaN"], r"^optimizer.learning_rate: .*finite number"),
        (
            ["server.placement=colocated"],
            r"^server.placement: trainer and servers on the same GPUs are called shared here; set shared",
        ),
        (["server.placement=same"], r"^server.placement: Input should be 'disaggregated' or 'shared' \(got 'same'\)$"),
        (
            ["server.placement=shared", "staleness.mode=bounded"],
            r"mode = bounded: in bounded mode the servers never stop",
        ),
        (["server.placement=shared", 'server.urls=["http://10.0.0.7:1"]'], r"has to start and stop the servers"),
        (
            ["server.placement=shared", "server.device=cuda"],
            r"device = cpu and server.device = cuda: .* nothing to share",
        ),
        (
            ["device=cuda", "server.device=cuda", "server.placement=shared"],
            r"publish.transport = broadcast: NCCL refuses",
        ),
        (
            [
                "device=cuda",
                "server.device=cuda",
                "server.placement=shared",
                "publish.transport=disk",
                "server.count=3",
            ],
            r"server.count x server.tensor_parallel = 3 exceeds the trainer's 1 GPUs; lower one",
        ),
        (["device=tpu"], r"^device: Input should be 'cpu' or 'cuda' \(got 'tpu'\)$"),
        (["name=../elsewhere"], r"^name: .*pattern.* \(got '../elsewhere'\)$"),
        (
            ["objective.name=reinforce"],
            r"^objective.name = 'reinforce': there is no such objective; known: minpro, cispo, ",
        ),
        (
            ["objective.name=grpo", "objective.dual_clip=1.2"],
            r"dual_clip = 1.2 must exceed 1 \+ clip_high = 1.28",
        ),
        (["staleness.delay_steps=-1"], r"^staleness.delay_steps: .*\(got -1\)$"),
        (["batch.num_prompts=5"], "batch.num_prompts = 5 must be a multiple of batch.mini_batch_prompts = 2"),
        (["sampling.top_p=0.9"], r"^sampling: top_p = 0.9 needs top_k: SGLang reports .* set top_k too, or top_p to 1"),
        (["sampling.top_k=1"], r"^sampling: top_k = 1 leaves no choice"),
        (["sampling.top_k=4097"], r"^sampling.top_k: .*less than or equal to 4096 \(got 4097\)"),
        (
            ["sampling.top_k=50", 'server.arguments={"sampling-mask-max-tokens": 40}'],
            r"sampling_mask_max_tokens = 40 must be at least sampling.top_k = 50",
        ),
        (["sampling.max_response_tokens=100"], r"116 must fit in a row: raise batch.max_tokens_per_row = 64"),
        (["parallel.data=32"], "16 sequences for parallel.data = 32 ranks: raise batch.mini_batch_prompts"),
        (["model.dtype=bfloat16"], "model.dtype = bfloat16 needs device = cuda; set model.dtype to float32"),
        (
            ["model.backend=transformer_engine"],
            "backend = transformer_engine needs device = cuda .*; set model.backend to auto or torch",
        ),
        (["optimizer.cpu_offload=0.5"], "cpu_offload = 0.5 .* needs device = cuda and .*bfloat16; set it to 0"),
        (["device=cuda", "optimizer.cpu_offload=0.5"], "needs device = cuda and model.dtype = bfloat16"),
        (["device=cuda", "model.backend=transformer_engine"], "needs device = cuda and model.dtype = bfloat16"),
        (
            ["parallel.tensor=2", "parallel.data=1", "parallel.expert=4"],
            r"expert_tensor = 4 x 1 = 4 must divide .* = 2;",
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=[3,2,1]"],
            r"pipeline_layers = 3\+2\+1: 3 numbers for pipeline x virtual_pipeline = 2 x 1 = 2 model chunks: give",
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=4+0"],
            r"= 4\+0: every stage needs at least one layer: give numbers of",
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=4+x"],
            r"pipeline_layers.1: Input should be a valid integer",
        ),
        (["parallel.pipeline=2", "parallel.pipeline_layers=4++2"], r"pipeline_layers.1: Input should be a valid int"),
        (["parallel.pipeline_layers=4"], r"pipeline_layers: Input should be a valid tuple"),
        (["parallel.virtual_pipeline=2"], "virtual_pipeline = 2 needs pipeline > 1"),
    ],
)
def test_a_refusal_names_field_value_and_rule(config, assignments, pattern):
    assert re.search(pattern, refusal(config, *assignments)), refusal(config, *assignments)


def test_every_wrong_field_has_its_own_line(config):
    lines = refusal(config, "seed=-1", "batch.num_prompts=0").splitlines()
    assert [line.split(":")[0] for line in lines] == ["seed", "batch.num_prompts"]


def test_unknown_fields_in_a_file_are_refused(config):
    values = json.loads(config.to_json()) | {"sed": 1}
    with pytest.raises(ValueError, match=r"sed: Extra inputs are not permitted"):
        RunConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("degrees", "data_size", "world_size"),
    [
        ({}, 1, 1),
        ({"tensor": 2, "expert": 2}, 1, 2),
        ({"expert": 8}, 8, 8),
        ({"tensor": 4, "expert": 8, "pipeline": 2}, 2, 16),
        ({"tensor": 2, "context": 2, "expert": 2, "expert_tensor": 2}, 1, 4),
        ({"tensor": 2, "expert": 3}, 3, 6),
        ({"tensor": 2, "data": 4, "expert": 8}, 4, 8),
    ],
)
def test_the_data_degree_is_the_smallest_in_which_the_experts_fit(degrees, data_size, world_size):
    parallel = ParallelConfig(**degrees)
    assert (parallel.data_size, parallel.world_size) == (data_size, world_size)


def test_routes_of_the_servers_are_refused_where_a_retraction_would_replace_them(config):
    replayed = ["model.routing_replay=rollout", "staleness.mode=bounded"]
    refused = refusal(config, *replayed)  # retract is the default
    for part in (
        "model.routing_replay = rollout with staleness.mode = bounded and publish.pause_mode = retract:",
        "set publish.pause_mode to abort or in_place, or model.routing_replay to none",
    ):
        assert part in refused
    for mode in ("abort", "in_place"):
        assert with_overrides(config, [*replayed, f"publish.pause_mode={mode}"]).publish.pause_mode == mode
    assert with_overrides(config, replayed[:1]).model.routing_replay == "rollout"  # no weights change under a response
    assert with_overrides(config, replayed[1:]).staleness.mode == "bounded"


@pytest.mark.parametrize(
    ("degrees", "chunks"),
    [
        ({"pipeline": 2}, (3, 3)),
        ({"pipeline": 2, "pipeline_layers": [4, 2]}, (4, 2)),
        ({"pipeline": "2", "pipeline_layers": "4+2"}, (4, 2)),
        ({"pipeline": 2, "pipeline_layers": ""}, (3, 3)),
        ({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": "2+1+1+2"}, (2, 1, 1, 2)),
    ],
    ids=str,
)
def test_stages_have_as_many_layers_as_listed_or_all_the_same(degrees, chunks):
    assert ParallelConfig(**degrees).chunk_layers(6) == chunks


def test_seeds_differ_by_run_purpose_and_place():
    seeds = {
        derive_seed(run, purpose, *place)
        for run in range(5)
        for purpose in ("sampling", "prompts")
        for place in [(), (0,), (1,), (0, 1), (1, 0), (10,)]
    }
    assert len(seeds) == 5 * 2 * 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(1, "sampling", 7, 0) == 132053566  # a changed seed changes every run


def test_the_demo_is_what_its_description_says():
    demo = tiny_moe()
    assert (demo.parallel.world_size, demo.batch.updates_per_step) == (2, 4)
    assert (demo.objective, demo.staleness.delay_steps) == (MinproConfig(clip_low=1, clip_high=4), 2)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        (tiny_moe_cispo, {"name": "demo-cispo", "objective": CispoConfig()}),
        (tiny_moe_smoke, {"name": "demo-smoke", "num_global_steps": 4}),
    ],
)
def test_a_variant_differs_from_the_demo_only_where_it_says(variant, changes):
    made, demo = variant(), tiny_moe()
    different = {name for name in RunConfig.model_fields if getattr(made, name) != getattr(demo, name)}
    assert different - {"evaluation"} == changes.keys()
    assert {name: getattr(made, name) for name in changes} == changes


def test_rows_must_hold_the_longest_sequence_with_its_padding(config):
    longest = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
    assert with_overrides(config, [f"batch.max_tokens_per_row={longest}"]).batch.max_tokens_per_row == longest
    odd = with_overrides(config, [f"sampling.max_response_tokens={config.sampling.max_response_tokens - 1}"])
    with pytest.raises(ValueError, match=f"padded to a multiple of 4 for the mesh: {longest} must fit"):
        with_overrides(odd, [f"batch.max_tokens_per_row={longest - 1}", "parallel.context=2", "parallel.tensor=1"])
