"""A run that learns something within minutes on two CPU cores: a tiny MoE policy that learns to calculate."""

from minpro_megatron.config.batch import BatchConfig
from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.evaluation import EvaluationConfig
from minpro_megatron.config.model import ModelConfig
from minpro_megatron.config.objective import MinproConfig
from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.config.staleness import StalenessConfig
from minpro_megatron.recipes.places import ARTIFACTS, DATA


def tiny_moe() -> RunConfig:
    """MinPRO two global steps off-policy (8 to 11 updates) on two trainer ranks and one server."""
    model = ARTIFACTS / "tiny_moe"
    return RunConfig(
        name="demo",
        num_global_steps=120,
        device="cpu",
        model=ModelConfig(hf_path=str(model / "hf"), megatron_path=str(model / "megatron"), dtype="float32"),
        data=DataConfig(
            train_file=str(DATA / "calculator_train.jsonl"),
            heldout_file=str(DATA / "calculator_heldout.jsonl"),
        ),
        parallel=ParallelConfig(tensor=2, expert=2),
        objective=MinproConfig(clip_low=1.0, clip_high=4.0),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_global_steps=5),
        batch=BatchConfig(num_prompts=32, responses_per_prompt=8, mini_batch_prompts=8, max_tokens_per_row=1024),
        sampling=SamplingConfig(max_prompt_tokens=16, max_response_tokens=8),
        staleness=StalenessConfig(delay_steps=2),
        server=ServerConfig(device="cpu", dtype="float32", max_total_tokens=16384, start_timeout_s=300),
        evaluation=EvaluationConfig(num_prompts=157, samples_per_prompt=8, every_steps=30),
    )


def tiny_moe_cispo() -> RunConfig:
    """The same run with CISPO, to compare."""
    return with_overrides(tiny_moe(), ["name=demo-cispo", "objective.name=cispo"])


def tiny_moe_smoke() -> RunConfig:
    """The same run reduced to a few steps, to check that everything works together."""
    return with_overrides(tiny_moe(), ["name=demo-smoke", "num_global_steps=4", "evaluation.num_prompts=16"])
