"""PrefixRL (arXiv:2601.18795) at a small scale: a tiny MoE learns long calculator tasks that it rarely solves.

`python -m benchmarks.prefix_rl` makes the model and the prompts and compares the two runs; the results are in
benchmarks/prefix_rl.md.
"""

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.recipes.demo import tiny_moe
from minpro_megatron.recipes.places import ARTIFACTS, DATA

FOLDER = ARTIFACTS / "prefix_rl"


def prefixed() -> RunConfig:
    """Three quarters of the prompts include 40 to 80 % of a correct response (`minpro prefixes`)."""
    return with_overrides(
        tiny_moe(),
        [
            "name=prefix-rl",
            "num_global_steps=24",
            f"model.hf_path={FOLDER / 'hf'}",
            f"model.megatron_path={FOLDER / 'megatron'}",
            f"data.train_file={FOLDER / 'prefixed.jsonl'}",
            f"data.heldout_file={DATA / 'calculator_steps_heldout.jsonl'}",
            "parallel.tensor=1",
            "parallel.expert=1",
            "optimizer.learning_rate=5e-4",
            "optimizer.warmup_global_steps=2",
            "batch.num_prompts=8",
            "batch.mini_batch_prompts=4",
            "batch.max_tokens_per_row=2048",
            "sampling.max_prompt_tokens=40",
            "sampling.max_response_tokens=20",
            "server.engine=reference",  # deterministic sampling: the same seed gives the same curve
            "server.start_timeout_s=180",
            "reward.function=minpro_megatron.rewards.calculator_steps:grade",
            "evaluation.num_prompts=48",
            "evaluation.samples_per_prompt=4",
        ],
    )


def plain() -> RunConfig:
    """The same run on the same problems without prefixes, to compare."""
    return with_overrides(prefixed(), ["name=plain-rl", f"data.train_file={FOLDER / 'plain.jsonl'}"])


def supervised() -> RunConfig:
    """Supervised fine-tuning on the traces that the prefixes are cut from, for six epochs of 48 traces."""
    return with_overrides(
        prefixed(),
        [
            "name=prefix-rl-sft",
            "objective.name=sft",
            f"data.demonstrations={FOLDER / 'demonstrations.jsonl'}",
            "num_global_steps=18",
            "batch.num_prompts=16",
            "batch.mini_batch_prompts=16",
            "batch.responses_per_prompt=1",
            "staleness.delay_steps=0",
            "evaluation.every_steps=0",
        ],
    )


def after_supervised() -> RunConfig:
    """The run on plain problems, from the weights of `supervised`."""
    folder = FOLDER / "after_sft"
    paths = [f"model.hf_path={folder / 'hf'}", f"model.megatron_path={folder / 'megatron'}"]
    return with_overrides(plain(), ["name=sft-then-rl", *paths])
