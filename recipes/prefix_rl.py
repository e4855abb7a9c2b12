"""PrefixRL (arXiv:2601.18795) in small: a tiny MoE learns long calculator tasks that it rarely solves.

`python -m benchmarks.prefix_rl` makes the model and the prompts and compares the two runs; what came of it stands in
benchmarks/prefix_rl.md.
"""

from pathlib import Path

from minpro_megatron.config.objective import MinproConfig
from minpro_megatron.config.rollout import (
    CollectorConfig,
    DataConfig,
    EvaluationConfig,
    SamplingConfig,
    ServerConfig,
    StalenessConfig,
)
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.config.trainer import BatchConfig, ModelConfig, OptimizerConfig

_ROOT = Path(__file__).resolve().parent.parent
FOLDER = _ROOT / "artifacts" / "prefix_rl"


def prefixed() -> RunConfig:
    """Three prompts in four begin with 40 to 80 % of a right response (tools/build_prefixes.py)."""
    return RunConfig(
        name="prefix-rl",
        num_global_steps=24,
        device="cpu",
        model=ModelConfig(hf_path=str(FOLDER / "hf"), megatron_path=str(FOLDER / "megatron"), dtype="float32"),
        data=DataConfig(
            train_file=str(FOLDER / "prefixed.jsonl"),
            heldout_file=str(_ROOT / "recipes" / "data" / "calculator_steps_heldout.jsonl"),
        ),
        objective=MinproConfig(clip_low=1.0, clip_high=4.0),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_global_steps=2),
        batch=BatchConfig(num_prompts=8, responses_per_prompt=8, mini_batch_prompts=4, max_tokens_per_row=2048),
        sampling=SamplingConfig(max_prompt_tokens=40, max_response_tokens=20),
        staleness=StalenessConfig(delay_steps=2),
        # deterministic sampling: a seed gives the same curve again
        server=ServerConfig(engine="reference", device="cpu", dtype="float32", start_timeout_s=180),
        collector=CollectorConfig(reward="minpro_megatron.rewards.calculator_steps:grade"),
        evaluation=EvaluationConfig(num_prompts=48, samples_per_prompt=4),
    )


def plain() -> RunConfig:
    """The same run on the same problems without prefixes, to compare."""
    return with_overrides(prefixed(), ["name=plain-rl", f"data.train_file={FOLDER / 'plain.jsonl'}"])
