"""The experiments of arXiv:2601.22718 (its Table 3), and functions that make variants of any run.

recipes/qwen3_30b_a3b.py, qwen3_8b.py and qwen3_14b.py define the runs themselves. Their files are searched in the
folder named by the environment variable MINPRO_ROOT (without it `artifacts` next to this package), which trainer and
servers must both be able to read:

    models/Qwen3-8B-Base/hf             the released model
    models/Qwen3-8B-Base/megatron       converted from it by `minpro convert`
    data/dapo.jsonl                     made by `minpro prepare dapo`
    data/dapo_prefixed.jsonl            made by `minpro prefixes`, for the prefix_rl runs
    data/aime24.jsonl, gsm8k.jsonl ...  the seven benchmarks, made by `minpro prepare`
    runs/                               the output of the runs

A recipe can be evaluated without these files; a launch checks them. Other paths are settings: model.hf_path=...,
data.train_file=...

Each recipe states how its GPUs are divided. Memory is calculated as `minpro convert plan` does: bfloat16
weights, float32 gradients and AdamW's states in float32. In addition there are activations (with model.recompute =
full the input of each layer: tokens per rank x hidden size x 2 bytes x layers, at most 5 GB in these recipes), those of
one layer, and the buffers of NCCL and publishing, for which 20 GB of an 80 GB GPU are left free. Whole layers are
recomputed because their activations would not fit: for Qwen3-30B-A3B and Qwen3-8B about 60 and 46 GB per rank
are expected (for Qwen3-14B 34 GB, which would just fit).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from minpro_megatron.config.batch import BatchConfig
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.evaluation import BenchmarkConfig, EvaluationConfig
from minpro_megatron.config.model import ModelConfig
from minpro_megatron.config.objective import MinproConfig
from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.config.staleness import StalenessConfig
from minpro_megatron.recipes.places import ARTIFACTS

ROOT_VARIABLE = "MINPRO_ROOT"
# Samples per prompt during a run. The paper's evaluation (section 5.1) has 128 for the first three, which makes two
# thirds of its 19,132 responses; `minpro eval` takes those of the exported weights. Publication waits for evaluations:
# with 128 samples the run on 64 GPUs would take 0.8 hours longer for each, with 32 it takes 0.4 hours longer.
BENCHMARK_SAMPLES = {
    "aime24": 32, "aime25": 32, "amc23": 32, "math500": 2, "olympiad": 2, "minerva": 2, "gsm8k": 2,
}  # fmt: skip
# The titles of the runs of each objective; the first one is the main run itself.
OBJECTIVES = {
    "minpro": "MinPRO",
    "cispo": "CISPO",
    "grpo": "GRPO with DAPO's clip",
    "gspo": "GSPO",
    "m2po": "M2PO",
    # not in the paper
    "ctpo": "CTPO (arXiv:2605.07331)",
    "ctpo_geomean": "CTPO on geometric means (arXiv:2605.07331)",
    "dppo": "DPPO (arXiv:2602.04879)",
    "cppo": "CPPO (arXiv:2606.10968)",
    "trm": "TRM (arXiv:2512.23075)",
    "sapo": "SAPO (arXiv:2511.20347)",
    "vespo": "VESPO (arXiv:2602.10693)",
    "pnpo": "PNPO (arXiv:2608.01418)",
    "p3o": "P3O (arXiv:2605.12380)",
    "sat": "SAT (arXiv:2607.18722)",
}

Recipe = Callable[[], RunConfig]


def table_3(
    model: str,
    parallel: ParallelConfig,
    server: ServerConfig,
    *,
    num_global_steps: int = 120,
    num_prompts: int = 512,
    mini_batch_prompts: int = 32,
) -> RunConfig:
    """MinPRO with a delay of two global steps on the released model `model`.

    The first 400 prompts of MATH500 are also the held-out set, whose pass@1 selects the best checkpoint. The benchmarks
    are sampled in full, about 18,000 responses, so only the first, the last and every 40th version are evaluated.
    """
    root = Path(os.environ.get(ROOT_VARIABLE) or ARTIFACTS).absolute()
    data = root / "data"
    return RunConfig(
        name=f"{model.removesuffix('-Base').lower()}-minpro",
        runs_dir=str(root / "runs"),
        num_global_steps=num_global_steps,
        model=ModelConfig(
            hf_path=str(root / "models" / model / "hf"),
            megatron_path=str(root / "models" / model / "megatron"),
            recompute="full",
        ),
        data=DataConfig(
            train_file=str(data / "dapo.jsonl"), heldout_file=str(data / "math500.jsonl"), instruction="dapo"
        ),
        parallel=parallel,
        objective=MinproConfig(clip_low=1.0, clip_high=4.0),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, warmup_global_steps=10, beta1=0.9, beta2=0.999, weight_decay=0.1, clip_grad=1.0
        ),
        batch=BatchConfig(
            num_prompts=num_prompts,
            responses_per_prompt=8,
            mini_batch_prompts=mini_batch_prompts,
            max_tokens_per_row=32768,
        ),
        sampling=SamplingConfig(temperature=1.0, max_prompt_tokens=2048, max_response_tokens=20480),
        staleness=StalenessConfig(mode="delay", delay_steps=2),
        server=server,
        reward=RewardConfig(function="math", workers=8),
        checkpoint=CheckpointConfig(every_minutes=60),
        evaluation=EvaluationConfig(
            num_prompts=400,
            samples_per_prompt=2,
            every_steps=40,
            temperature=1.0,
            top_p=0.7,
            benchmarks=[
                BenchmarkConfig(name=name, file=str(data / f"{name}.jsonl"), samples_per_prompt=samples)
                for name, samples in BENCHMARK_SAMPLES.items()
            ],
        ),
    )


def servers(count: int, tensor_parallel: int) -> ServerConfig:
    """`count` servers of `tensor_parallel` GPUs each. A group may take an hour: 20,480 tokens at 6 tokens/s."""
    return ServerConfig(count=count, tensor_parallel=tensor_parallel, request_timeout_s=3600)


def with_objective(config: RunConfig, objective: str, settings: Sequence[str] = ()) -> RunConfig:
    """The same run with another objective at its own defaults (for objectives of the paper, those of its Table 3), and
    with other `settings` where they are given, as "objective.threshold=0.2"."""
    name = f"{config.name.removesuffix(config.objective.name)}{objective.replace('_', '-')}"
    return with_overrides(config, [f"name={name}", f"objective.name={objective}", *settings])


def on_policy(config: RunConfig) -> RunConfig:
    """The same run with n = 0: every batch is sampled by the weights that train on it."""
    return with_overrides(config, [f"name={config.name}-on-policy", "staleness.delay_steps=0"])


def bounded(config: RunConfig) -> RunConfig:
    """The same run with servers that never wait: weights change while responses are generated, no token is older than
    two versions, and behavior log-probs are computed under each version that a batch contains."""
    return with_overrides(
        config, [f"name={config.name}-bounded", "staleness.mode=bounded", "staleness.max_staleness=2"]
    )


def long_context(config: RunConfig) -> RunConfig:
    """The same run with responses up to the model's 32,768 positions, minus 2,048 for the prompt and SGLang's
    margin of 8. Rows have twice the tokens, so that one holds more than the longest response, with twice the context
    ranks and half the data ranks, so that the tokens per rank stay the same."""
    parallel = config.parallel
    return with_overrides(
        config,
        [
            f"name={config.name}-long-context",
            f"sampling.max_response_tokens={32768 - config.sampling.max_prompt_tokens - 8}",
            "batch.max_tokens_per_row=65536",
            f"parallel.context={2 * parallel.context}",
            f"parallel.data={parallel.data // 2}",
            "server.request_timeout_s=7200",
        ],
    )


def prefix_rl(config: RunConfig) -> RunConfig:
    """The same run on prompts three quarters of which include a prefix of a correct response (arXiv:2601.18795). Prompt
    and prefix have at most 10,240 tokens together; longer rows are skipped, and counted in the log."""
    train_file = Path(config.data.train_file).with_name("dapo_prefixed.jsonl")
    return with_overrides(
        config,
        [f"name={config.name}-prefix-rl", f"data.train_file={train_file}", "sampling.max_prompt_tokens=10240"],
    )


def one_machine(config: RunConfig, parallel: ParallelConfig, server: ServerConfig, cpu_offload: float) -> RunConfig:
    """The same run on eight GPUs of 80 GB: `parallel` on some, `server` on the others. `cpu_offload` is the fraction
    of the optimizer's states that is kept in host memory."""
    assert parallel.world_size + server.count * server.tensor_parallel == 8
    moved = config.model_copy(update={"parallel": parallel, "server": server})
    return with_overrides(moved, [f"name={config.name}-one-machine", f"optimizer.cpu_offload={cpu_offload}"])


def one_machine_in_turns(
    config: RunConfig, parallel: ParallelConfig, server: ServerConfig, memory_fraction: float, cpu_offload: float = 0.0
) -> RunConfig:
    """The same run on eight GPUs of 80 GB, which trainer and servers both use, in turns. `memory_fraction` of a GPU is
    for a server's weights and KV cache: the trainer keeps its weights until the servers' canaries are checked."""
    assert parallel.world_size == server.count * server.tensor_parallel == 8
    moved = config.model_copy(update={"parallel": parallel, "server": server})
    changes = ["server.placement=shared", "publish.transport=shared_memory", f"optimizer.cpu_offload={cpu_offload}"]
    name = f"name={config.name}-one-machine-shared"
    return with_overrides(moved, [name, f"server.memory_fraction={memory_fraction}", *changes])


def variants(minpro: Recipe, settings: Mapping[str, Sequence[str]] | None = None) -> dict[str, Recipe]:
    """The recipes, by name, that are variants of a model's main run: every objective, off-policy and on-policy, and
    those that need only that run. A module lists them as its VARIANTS (launch/recipe.py). `settings` are those of
    objectives whose papers have other ones for this model than by default."""
    runs = {"minpro": minpro}
    for objective, title in OBJECTIVES.items():
        if objective != "minpro":
            edit = partial(with_objective, objective=objective, settings=(settings or {}).get(objective, ()))
            runs[objective] = _edited(minpro, edit, f"{title}, two global steps off-policy.")
        runs[f"{objective}_on_policy"] = _edited(runs[objective], on_policy, f"{title} on-policy.")
    never_wait = "with servers that never wait: no token older than two versions."
    runs["minpro_bounded"] = _edited(minpro, bounded, f"MinPRO {never_wait}")
    runs["cispo_bounded"] = _edited(runs["cispo"], bounded, f"CISPO {never_wait}")
    positions = "MinPRO with responses of up to 30,712 tokens: all of the model's positions."
    runs["minpro_long_context"] = _edited(minpro, long_context, positions)
    prefixes = "MinPRO on prompts that include a part of a correct response (PrefixRL)."
    runs["minpro_prefix_rl"] = _edited(minpro, prefix_rl, prefixes)
    del runs["minpro"]
    return runs


def _edited(base: Recipe, edit: Callable[[RunConfig], RunConfig], purpose: str) -> Recipe:
    def recipe() -> RunConfig:
        return edit(base())

    recipe.__doc__ = purpose
    return recipe
