"""Compares the planner's predictions with measurements of published reinforcement-learning runs and known model sizes.

    python -m benchmarks.plan_run

Settings and figures are those of the sources named with each run. The cost model was not fitted to them; assumptions
for values that a source does not state are in `assumed`.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.models.known_models.find import find_architecture
from minpro_megatron.planning.parameters import active_parameters, model_parameters
from minpro_megatron.planning.plan import ClusterSize, Plan, plan_run
from minpro_megatron.planning.workload import Workload

NEMO = "NeMo RL docs/about/performance-summary.md, {}; settings from examples/configs/recipes/llm/performance/{}.yaml"
VERL = (
    "verl docs/advance/fully_async.md, 30B Model Mode Experiment; settings from "
    "verl/experimental/fully_async_policy/shell/grpo_30b_a3b_base_math_megatron_96_32.sh"
)
ON_POLICY = {"mode": "delay", "delay_steps": 0}


@dataclass(frozen=True)
class PublishedRun:
    """A run, in this project's settings."""

    name: str
    source: str
    step_s: float  # as published
    cluster: ClusterSize
    settings: dict[str, Any]
    prompt_tokens: float
    response_tokens: float
    parts_s: dict[str, float] = field(default_factory=dict)  # as published: generation, score, train
    assumed: tuple[str, ...] = ()


def nemo(name: str, release: str, recipe: str, step_s: float, sequence: int, **settings: Any) -> PublishedRun:
    """64 prompts x 32 responses of at most 4,096 tokens in all; the average sequence is published."""
    trainer, servers = settings.pop("gpus")
    updates = settings.pop("updates")
    prompt = 100
    base = {
        "batch": {"num_prompts": 64, "responses_per_prompt": 32, "mini_batch_prompts": 64 // updates},
        "sampling": {"max_prompt_tokens": 512, "max_response_tokens": 4096 - prompt},
        "loss": {"kl": {"enabled": True}},
        "checkpoint": {"every_steps": 0},
        "publish": {"pause_mode": "in_place"},
    }
    base["batch"]["max_tokens_per_row"] = 4096 + 512
    return PublishedRun(
        name=name,
        source=NEMO.format(release, recipe),
        step_s=step_s,
        cluster=ClusterSize("h100-80gb", trainer, servers),
        settings=base | settings,
        prompt_tokens=prompt,
        response_tokens=sequence - prompt,
        assumed=("100 prompt tokens",),
    )


def verl(name: str, step_s: float, gpus: tuple[int, int], parts_s: dict[str, float], **settings: Any) -> PublishedRun:
    """512 prompts x 16 responses of at most 8,192 tokens, updates of 128 prompts, a reference pass."""
    return PublishedRun(
        name=name,
        source=VERL,
        step_s=step_s,
        cluster=ClusterSize("h20-96gb", *gpus),
        settings={
            "model": {"hf_path": MIXTURE},
            "batch": {
                "num_prompts": 512,
                "responses_per_prompt": 16,
                "mini_batch_prompts": 128,
                "max_tokens_per_row": 4 * 10240,
            },
            "sampling": {"max_prompt_tokens": 2048, "max_response_tokens": 8192},
            "loss": {"kl": {"enabled": True}},
            "optimizer": {"cpu_offload": 1.0},
            "checkpoint": {"every_steps": 0},
            "server": {"tensor_parallel": 4, "count": gpus[1] // 4, "max_running_requests": 1024},
        }
        | settings,
        prompt_tokens=200,
        response_tokens=VERL_RESPONSE_TOKENS,
        parts_s=parts_s,
        assumed=("200 prompt tokens", f"{VERL_RESPONSE_TOKENS:,} response tokens: the mean is not published"),
    )


# Not published. Derived from the asynchronous run's own reference pass, 50.05 s on 32 GPUs: the number of tokens for
# which a forward pass takes that time in the cost model. So that part of that run is no evidence; everything else is.
VERL_RESPONSE_TOKENS = 1150
QWEN3_32B = "qwen3-32b"
ONE_STEP_OFF = {"mode": "bounded", "max_staleness": 1}
MIXTURE = "Qwen/Qwen3-30B-A3B"
SERVER_2 = {"tensor_parallel": 2, "max_running_requests": 1024}
RUNS = [
    nemo(
        "NeMo RL v0.6, Qwen3-30B-A3B, 32 H100, on-policy, colocated",
        "v0.6",
        "grpo-qwen3-30ba3b-4n8g",
        192,
        3203,
        gpus=(32, 32),
        updates=4,
        model={"hf_path": MIXTURE},
        parallel={"expert": 8, "data": 32},
        staleness=ON_POLICY,
        server=SERVER_2 | {"count": 16},
    ),
    nemo(
        "NeMo RL v0.6, Qwen3-30B-A3B, 16 + 16 H100, one step off",
        "v0.6",
        "grpo-qwen3-30ba3b-4n8g-async-1off",
        152,
        3201,
        gpus=(16, 16),
        updates=4,
        model={"hf_path": MIXTURE},
        parallel={"expert": 8, "pipeline": 2, "data": 8},
        staleness=ONE_STEP_OFF,
        server=SERVER_2 | {"count": 8},
    ),
    nemo(
        "NeMo RL v0.6, Qwen3-30B-A3B, 128 + 64 H100, eight steps off",
        "v0.6",
        "grpo-qwen3-30ba3b-24n8g-async-8off",
        34.5,
        3206,
        gpus=(128, 64),
        updates=4,
        model={"hf_path": MIXTURE},
        parallel={"expert": 8, "data": 128},
        staleness={"mode": "bounded", "max_staleness": 8},
        server=SERVER_2 | {"count": 32},
    ),
    nemo(
        "NeMo RL v0.5, Qwen3-32B, 32 H100, on-policy, colocated",
        "v0.5",
        "grpo-qwen3-32b-4n8g",
        376,
        3251,
        gpus=(32, 32),
        updates=4,
        model={"hf_path": QWEN3_32B},
        parallel={"tensor": 4, "pipeline": 4, "data": 2},
        staleness=ON_POLICY,
        server={"tensor_parallel": 4, "count": 8, "max_running_requests": 1024},
    ),
    nemo(
        "NeMo RL v0.5, Qwen3-32B, 32 + 32 H100, one step off",
        "v0.5",
        "grpo-qwen3-32b-8n8g-async-1off",
        200,
        3252,
        gpus=(32, 32),
        updates=4,
        model={"hf_path": QWEN3_32B},
        parallel={"tensor": 4, "pipeline": 4, "data": 2},
        staleness=ONE_STEP_OFF,
        server={"tensor_parallel": 4, "count": 8, "max_running_requests": 1024},
    ),
    verl(
        "verl, Qwen3-30B-A3B-Base, 128 H20, synchronous, colocated",
        497.89,
        (128, 128),
        {"generation": 348.05, "score": 28.73, "train": 86.27 + 20.86},
        parallel={"tensor": 2, "context": 2, "expert": 8, "data": 32},
        staleness=ON_POLICY,
    ),
    verl(
        "verl, Qwen3-30B-A3B-Base, 32 + 96 H20, fully asynchronous",
        282.75,
        (32, 96),
        {"train": 206.63 + 50.05},
        parallel={"tensor": 2, "context": 2, "expert": 8, "data": 8},
        staleness=ONE_STEP_OFF | {"behavior_log_probs": "rollout"},
    ),
]


def config_of(run: PublishedRun) -> RunConfig:
    settings = {
        "name": "published",
        "data": {"train_file": "unused", "heldout_file": "unused"},
    } | run.settings
    settings["model"] = {"megatron_path": "unused", "recompute": "none"} | run.settings["model"]
    return parse_run_config(settings)


def planned(run: PublishedRun) -> Plan:
    return plan_run(config_of(run), run.cluster, Workload(run.prompt_tokens, run.response_tokens))


def known_sizes() -> None:
    print("| model | parameters | bfloat16 GB | states GB (18 bytes per parameter) | active parameters per token |")
    print("|---|---|---|---|---|")
    for name in ("qwen3-30b-a3b", "qwen3-8b", "qwen3-14b", "qwen3-32b"):
        a = find_architecture(name)
        count = model_parameters(a)
        print(f"| {name} | {count:,} | {2 * count / 1e9:.2f} | {18 * count / 1e9:.0f} | {active_parameters(a):,} |")


def published_runs() -> list[float]:
    """Prints one row per run. Returns the errors of the step times, as fractions."""
    print("| run | step s: published | planned | error | planned: generation | scoring | updates | publishing |")
    print("|---|---|---|---|---|---|---|---|")
    errors = []
    for run in RUNS:
        plan = planned(run)
        errors.append(plan.step_s / run.step_s - 1)
        parts = {
            "generation": plan.generation_s,
            "score": plan.cost.score,
            "train": plan.cost.train,
            "publish": plan.cost.publish,
        }
        shown = [
            f"{seconds:.0f}" + (f" (published {run.parts_s[part]:.0f})" if part in run.parts_s else "")
            for part, seconds in parts.items()
        ]
        print(f"| {run.name} | {run.step_s:.0f} | {plan.step_s:.0f} | {errors[-1]:+.0%} | {' | '.join(shown)} |")
    return errors


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    known_sizes()
    print()
    errors = published_runs()
    mean = sum(abs(error) for error in errors) / len(errors)
    print(f"\nmean error {mean:.0%}, largest {max(errors, key=abs):+.0%}\n")
    for run in RUNS:
        print(f"- {run.name}: {run.source}; assumed: {', '.join(run.assumed)}")


if __name__ == "__main__":
    main()
