"""A tiny MoE learns to use a tool: products of three-digit numbers, which it can only answer with a calculator.

`python -m benchmarks.products` makes the model and compares runs with the calculator and without; the results are in
benchmarks/products.md.
"""

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.recipes.demo import tiny_moe
from minpro_megatron.recipes.places import ARTIFACTS, DATA

FOLDER = ARTIFACTS / "products"


def with_tool() -> RunConfig:
    """CTPO, one global step off-policy: the policy may call the calculator once, and reads the result."""
    return with_overrides(
        tiny_moe(),
        [
            "name=products-with-tool",
            "num_global_steps=40",
            f"model.hf_path={FOLDER / 'hf'}",
            f"model.megatron_path={FOLDER / 'megatron'}",
            f"data.train_file={DATA / 'products_train.jsonl'}",
            f"data.heldout_file={DATA / 'products_heldout.jsonl'}",
            "data.chat_template=true",  # it frames the calculator's answers
            "parallel.tensor=1",
            "parallel.expert=1",
            "objective.name=ctpo",
            "staleness.delay_steps=1",
            "optimizer.learning_rate=5e-4",
            "optimizer.warmup_global_steps=2",
            "batch.num_prompts=16",
            "batch.mini_batch_prompts=8",
            "batch.max_tokens_per_row=2048",
            "sampling.max_prompt_tokens=8",
            "sampling.max_response_tokens=24",
            "sampling.max_turns=2",
            "environment.name=minpro_megatron.environments.calculator:Calculator",
            "server.engine=reference",  # deterministic sampling: the same seed gives the same curve
            "server.start_timeout_s=180",
            "reward.function=minpro_megatron.rewards.products:grade",
            "evaluation.num_prompts=96",
            "evaluation.samples_per_prompt=4",
            "evaluation.every_steps=10",
        ],
    )


def without_tool() -> RunConfig:
    """The same run without the calculator, to compare: a response is one turn."""
    return with_overrides(with_tool(), ["name=products-without-tool", "environment.name=none", "sampling.max_turns=1"])
