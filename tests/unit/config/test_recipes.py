"""Every recipe is a valid run with the paper's figures (typed from arXiv:2601.22718, Table 3), on a mesh that fits."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.__main__ import main
from minpro_megatron.config.objective import CtpoConfig
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.benchmarks import BENCHMARKS
from minpro_megatron.launch.recipe import list_recipes, load_recipe
from minpro_megatron.models.architecture import Architecture, refuse_uneven_cuts
from minpro_megatron.models.known_models.find import find_architecture, known_config
from minpro_megatron.planning.plan import ClusterSize, plan_run
from minpro_megatron.recipes import demo, llama31_8b, paper, prefix_rl, products, qwen3_8b, qwen3_14b, qwen3_30b_a3b
from minpro_megatron.serving.server_command import context_length
from minpro_megatron.weights.plan import RankKind, rank_kinds
from tests.support.released_configs import QWEN3_8B, QWEN3_14B, QWEN3_30B_A3B

# The base models' config.json, as far as it differs from that of the models released beside them.
BASE = {"max_position_embeddings": 32768, "eos_token_id": 151643}
MODELS: dict[str, dict[str, Any]] = {
    "recipes.qwen3_30b_a3b": QWEN3_30B_A3B | BASE,
    "recipes.qwen3_8b": QWEN3_8B | BASE,
    "recipes.qwen3_14b": QWEN3_14B | BASE,
    "recipes.llama31_8b": known_config("llama-3.1-8b"),
}
# module -> (model, global steps, prompts a global step, prompts an update)
RUNS = {
    "recipes.qwen3_30b_a3b": ("Qwen3-30B-A3B-Base", 120, 512, 32),
    "recipes.qwen3_8b": ("Qwen3-8B-Base", 120, 512, 32),
    "recipes.qwen3_14b": ("Qwen3-14B-Base", 160, 256, 16),
}
OBJECTIVES = {
    "minpro": {"clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean"},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean"},
    "grpo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"},
    "gspo": {"clip_low": 2e-3, "clip_high": 2e-3, "aggregation": "sequence_mean"},
    "m2po": {"second_moment": 0.04, "aggregation": "token_mean"},
}
# by section; what is the same in all runs of the table
SAME = {
    "optimizer": {
        "learning_rate": 1e-6, "warmup_global_steps": 10, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1,
        "clip_grad": 1.0,
    },
    "sampling": {"temperature": 1.0, "max_prompt_tokens": 2048, "max_response_tokens": 20480},
    "evaluation": {"temperature": 1.0, "top_p": 0.7},
    "data": {"instruction": "dapo", "chat_template": False},
    "model": {"dtype": "bfloat16"},
}  # fmt: skip
BENCHMARK_SAMPLES = {
    "aime24": 128, "aime25": 128, "amc23": 128, "math500": 2, "olympiad": 2, "minerva": 2, "gsm8k": 2,
}  # fmt: skip
ALL = [line.split()[0] for line in list_recipes("recipes")]
LARGE = [recipe for recipe in ALL if recipe.partition(":")[0] in MODELS]
GPU_BYTES = 80e9
LEFT_FREE_BYTES = 20e9  # recipes/paper.py says for what


def module_of(recipe: str) -> str:
    return recipe.partition(":")[0]


@cache
def rank_of(architecture: Architecture, mesh: str) -> RankKind:
    """What each rank of a mesh (as JSON) holds; all hold the same."""
    (kind,) = rank_kinds(architecture, ParallelConfig.model_validate_json(mesh))
    return kind


@pytest.mark.parametrize("recipe", ALL)
def test_a_recipe_is_a_valid_run_and_survives_json(recipe: str) -> None:
    config = load_recipe(recipe)
    assert RunConfig.from_json(config.to_json()) == config


def test_no_two_runs_share_a_folder() -> None:
    folders = [load_recipe(recipe).run_dir for recipe in ALL]
    assert len(set(folders)) == len(folders) > 50


@pytest.mark.parametrize("on_policy", [False, True], ids=["n2", "n0"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("module", RUNS)
def test_the_figures_are_the_papers(module: str, objective: str, on_policy: bool) -> None:
    config = load_recipe(f"{module}:{objective}{'_on_policy' if on_policy else ''}")
    model, num_global_steps, num_prompts, mini_batch_prompts = RUNS[module]
    values = config.model_dump()
    assert config.num_global_steps == num_global_steps
    batch = config.batch
    assert (batch.num_prompts, batch.mini_batch_prompts, batch.responses_per_prompt) == (
        num_prompts,
        mini_batch_prompts,
        8,
    )
    assert (config.staleness.mode, config.staleness.delay_steps) == ("delay", 0 if on_policy else 2)
    assert config.objective.name == objective
    assert OBJECTIVES[objective].items() <= values["objective"].items()
    for section, settings in SAME.items():
        assert settings.items() <= values[section].items()
    assert Path(config.model.hf_path).parts[-2:] == (model, "hf")
    assert Path(config.data.train_file).name == "dapo.jsonl"
    samples = {one.name: one.samples_per_prompt for one in config.evaluation.benchmarks}
    assert samples == {name: min(32, of_paper) for name, of_paper in BENCHMARK_SAMPLES.items()}
    assert not any(getattr(config.loss, name).enabled for name in ("kl", "decoupled", "icepop", "overlong_penalty"))


def test_the_evaluation_is_that_of_the_command() -> None:
    assert {name: one.samples_per_prompt for name, one in BENCHMARKS.items()} == BENCHMARK_SAMPLES


@pytest.mark.parametrize("module", RUNS)
def test_runs_of_a_model_differ_in_nothing_but_objective_and_delay(module: str) -> None:
    def rest(recipe: str) -> dict[str, Any]:
        values = load_recipe(f"{module}:{recipe}").model_dump()
        return {**values, "name": "", "objective": {}, "staleness": {**values["staleness"], "delay_steps": 0}}

    for objective in paper.OBJECTIVES:
        assert rest(objective) == rest(f"{objective}_on_policy") == rest("minpro")


@pytest.mark.parametrize("recipe", LARGE)
def test_the_mesh_fits_the_model_and_the_memory(recipe: str) -> None:
    config = load_recipe(recipe)
    architecture = find_architecture(config.model.hf_path)
    refuse_uneven_cuts(architecture, config.parallel)
    kind = rank_of(architecture, config.parallel.model_dump_json())
    on_gpu = kind.weight_bytes + kind.gradient_bytes + kind.optimizer_bytes * (1 - config.optimizer.cpu_offload)
    assert on_gpu < GPU_BYTES - LEFT_FREE_BYTES
    # the input of every layer of a rank's part of a row
    tokens = config.batch.max_tokens_per_row / (config.parallel.tensor * config.parallel.context)
    assert tokens * architecture.hidden_size * 2 * architecture.num_layers < 5e9
    assert config.model.recompute == "full"
    server = config.server
    assert architecture.num_query_groups % server.tensor_parallel == 0
    # half of the servers' memory at least is for their KV cache
    whole = rank_of(architecture, ParallelConfig().model_dump_json())
    assert whole.weight_bytes / server.tensor_parallel < GPU_BYTES / 2


@pytest.mark.parametrize(
    ("module", "gpus"),
    [
        ("recipes.qwen3_30b_a3b", 64),
        ("recipes.qwen3_8b", 32),
        ("recipes.qwen3_14b", 32),
        ("recipes.llama31_8b", 32),
    ],
)
def test_the_gpus_are_those_that_the_module_names(module: str, gpus: int) -> None:
    for recipe in (one for one in LARGE if module_of(one) == module):
        config = load_recipe(recipe)
        wanted = 8 if "_one_machine" in recipe else gpus
        trains, serves = config.parallel.world_size, config.server.count * config.server.tensor_parallel
        assert (max(trains, serves) if config.server.takes_turns else trains + serves) == wanted


@pytest.mark.parametrize("recipe", LARGE)
def test_the_longest_sequences_fit_the_servers(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[module_of(recipe)]))
    length = context_length(with_overrides(load_recipe(recipe), [f"model.hf_path={tmp_path}"]))
    assert length == 32768 if recipe.endswith("_long_context") else length <= 32768


def test_variants_are_what_their_names_say() -> None:
    base = qwen3_8b.minpro()
    assert qwen3_8b.VARIANTS["minpro_bounded"]().staleness.mode == "bounded"
    assert qwen3_8b.VARIANTS["minpro_bounded"]().staleness.max_staleness == 2
    assert qwen3_8b.VARIANTS["cispo_bounded"]().objective == qwen3_8b.VARIANTS["cispo"]().objective
    ctpo = qwen3_8b.VARIANTS["ctpo"]().objective
    assert (ctpo.name, ctpo.aggregation) == ("ctpo", "sequence_mean")
    dense, mixture = (module.VARIANTS["cppo"]().objective for module in (qwen3_8b, qwen3_30b_a3b))
    assert (dense.name, dense.threshold, mixture.threshold) == ("cppo", 0.15, 0.2)
    longer = qwen3_8b.VARIANTS["minpro_long_context"]()
    assert (longer.parallel.context, longer.parallel.data) == (2 * base.parallel.context, base.parallel.data // 2)
    assert longer.sampling.max_response_tokens == 30712
    prefixed = qwen3_14b.VARIANTS["minpro_prefix_rl"]()
    assert Path(prefixed.data.train_file).name == "dapo_prefixed.jsonl"
    assert prefixed.sampling.max_prompt_tokens == 10240
    small = qwen3_30b_a3b.minpro_one_machine()
    assert small.optimizer.cpu_offload == 1
    assert {**small.model_dump(), "name": "", "parallel": 0, "server": 0, "optimizer": 0} == {
        **qwen3_30b_a3b.minpro().model_dump(), "name": "", "parallel": 0, "server": 0, "optimizer": 0,
    }  # fmt: skip


def test_the_tool_run_has_the_figures_of_ctpos_script() -> None:
    """Typed from ctpo.sh of horizon-llm/CTPO."""
    config = qwen3_14b.ctpo_tool()
    batch, sampling, objective = config.batch, config.sampling, config.objective
    assert (batch.num_prompts, batch.mini_batch_prompts, batch.responses_per_prompt) == (512, 32, 8)
    assert (sampling.max_prompt_tokens, sampling.max_response_tokens, sampling.max_turns) == (16000, 8000, 5)
    assert (config.num_global_steps, config.optimizer.learning_rate, config.staleness.delay_steps) == (305, 1e-6, 0)
    assert isinstance(objective, CtpoConfig)
    bounds = (objective.log_clip_low, objective.log_clip_high, objective.log_dual_clip, objective.position_exponent)
    assert bounds == (0.025, 0.05, 0.05, 0.5)
    assert (objective.aggregation, objective.log_clamp) == ("token_mean", 10)
    importance = config.loss.sequence_importance
    assert (importance.enabled, importance.cap) == (True, 5)
    assert config.data.chat_template_arguments == {"enable_thinking": False}
    assert Path(config.model.hf_path).parts[-2:] == ("Qwen3-14B", "hf")
    tool = config.environment.python_tool
    assert (config.environment.name, tool.max_calls_per_turn, tool.max_output_chars) == ("python_tool", 1, 12000)


def test_the_llama_run_is_reinforce_on_prefixed_prompts() -> None:
    """Of arXiv:2601.18795: the model, prefixed prompts, only the current policy's responses, and no division of
    advantages by their standard deviation. With one update a step every ratio is 1."""
    config = llama31_8b.prefix_rl()
    assert Path(config.model.hf_path).parts[-2:] == ("Llama-3.1-8B-Instruct", "hf")
    assert Path(config.data.train_file).name == "dapo_prefixed.jsonl"
    assert (config.staleness.delay_steps, config.batch.updates_per_step, config.loss.advantage) == (0, 1, "group_mean")
    assert config.data.chat_template
    plain = llama31_8b.plain_rl()
    assert Path(plain.data.train_file).name == "dapo_plain.jsonl"
    changed = {key for key, value in plain.model_dump().items() if value != config.model_dump()[key]}
    assert changed == {"name", "data"}


@pytest.mark.parametrize("module", [qwen3_8b, qwen3_14b, qwen3_30b_a3b])
def test_in_turns_both_have_all_eight_gpus(module: Any) -> None:
    config, base = module.minpro_one_machine_shared(), module.minpro()
    assert config.parallel.world_size == config.server.count * config.server.tensor_parallel == 8
    assert (config.server.placement, config.publish.transport) == ("shared", "shared_memory")
    changed = {"name": "", "parallel": 0, "server": 0, "optimizer": 0, "publish": 0}
    assert config.model_dump() | changed == base.model_dump() | changed
    plan = plan_run(config, ClusterSize("h100-80gb", 8, 8))
    assert plan.problems == []
    # the planner's error in memory is a few percent
    assert plan.turns is not None
    assert plan.turns.largest < 0.99 * plan.cluster.kind.memory_bytes
    separate = module.minpro_one_machine()
    apart = ClusterSize(
        "h100-80gb", separate.parallel.world_size, separate.server.count * separate.server.tensor_parallel
    )
    assert plan.step_s < plan_run(separate, apart).step_s


def test_a_share_of_other_than_eight_gpus_is_no_machine() -> None:
    with pytest.raises(AssertionError):
        paper.one_machine(qwen3_8b.minpro(), ParallelConfig(tensor=4), paper.servers(5, 1), cpu_offload=0)


def test_all_files_are_under_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paper.ROOT_VARIABLE, "/shared/rl")
    config = qwen3_30b_a3b.VARIANTS["gspo_on_policy"]()
    assert config.model.hf_path == "/shared/rl/models/Qwen3-30B-A3B-Base/hf"
    assert config.model.megatron_path == "/shared/rl/models/Qwen3-30B-A3B-Base/megatron"
    assert (config.data.train_file, config.data.heldout_file) == (
        "/shared/rl/data/dapo.jsonl",
        "/shared/rl/data/math500.jsonl",
    )
    assert config.evaluation.benchmarks[0].file == "/shared/rl/data/aime24.jsonl"
    assert str(config.run_dir) == "/shared/rl/runs/qwen3-30b-a3b-gspo-on-policy"
    monkeypatch.delenv(paper.ROOT_VARIABLE)
    artifacts = Path(paper.__file__).resolve().parent.parent / "artifacts"
    assert Path(qwen3_8b.minpro().data.train_file) == artifacts / "data" / "dapo.jsonl"


def test_the_small_prefix_run_keeps_the_demos_learner() -> None:
    """One rank and the deterministic engine on longer problems; what learns is the demo's."""
    ours, base = prefix_rl.prefixed(), demo.tiny_moe()
    assert (ours.objective, ours.staleness, ours.loss) == (base.objective, base.staleness, base.loss)
    assert (ours.parallel.world_size, ours.server.engine, ours.reward.function) == (
        1,
        "reference",
        "minpro_megatron.rewards.calculator_steps:grade",
    )
    plain = prefix_rl.plain().model_dump()
    assert {key for key, value in ours.model_dump().items() if value != plain[key]} == {"name", "data"}


def test_the_runs_with_and_without_the_tool_differ_in_nothing_else() -> None:
    ours, without = products.with_tool(), products.without_tool()
    ours_has, without_has = ours.model_dump(), without.model_dump()
    assert {key for key, value in ours_has.items() if value != without_has[key]} == {"name", "environment", "sampling"}
    assert ours.sampling.model_copy(update={"max_turns": 1}) == without.sampling
    assert ours.environment.enabled
    assert not without.environment.enabled


def test_the_list_names_every_recipe_with_its_purpose() -> None:
    lines = list_recipes("recipes")
    assert "recipes.qwen3_8b:cispo_on_policy" in ALL
    assert all(len(line.split(None, 1)) == 2 for line in lines), "a recipe without docstring"
    assert list_recipes("recipes.prefix_rl") == [
        "recipes.prefix_rl:prefixed          Three quarters of the prompts include 40 to 80 % of a correct response "
        "(`minpro prefixes`).",
        "recipes.prefix_rl:plain             The same run on the same problems without prefixes, to compare.",
        "recipes.prefix_rl:supervised        Supervised fine-tuning on the traces that the prefixes are cut from, for "
        "six epochs of 48 traces.",
        "recipes.prefix_rl:after_supervised  The run on plain problems, from the weights of `supervised`.",
    ]
    assert not any("paper:" in line for line in lines)  # its functions make recipes and are none


def test_the_command_prints_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out.splitlines() == list_recipes("recipes")
    assert main(["recipes", "recipes.demo"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("recipes.nope", "recipes of 'recipes.nope': there is no module 'recipes.nope'"),
        ("recipes.paper", "recipes of 'recipes.paper': it contains no recipe"),
    ],
)
def test_what_has_no_recipes_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        list_recipes(name)
    (line,) = caught.value.problems
    assert line.startswith(message)


@pytest.mark.parametrize("module", RUNS)
def test_the_error_for_an_unknown_recipe_lists_the_known_ones(module: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(f"{module}:nope")
    (line,) = caught.value.problems
    known = line.partition("it has: ")[2].split(", ")
    assert known == [recipe.partition(":")[2] for recipe in ALL if module_of(recipe) == module]
    assert {*paper.OBJECTIVES, "ctpo_on_policy", "minpro_long_context"} <= {*known}
