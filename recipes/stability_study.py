"""One run of the stability study: a tiny MoE on the calculator's chains, many updates off-policy.

`python -m benchmarks.stability_study` makes the model and the prompts, and repeats this run with every objective,
several delays and seeds; the results are in benchmarks/stability_study.md. After the study has made its files, a
single run through the whole system is:

    minpro launch recipes.stability_study:run objective.name=cispo staleness.delay_steps=8
"""

from minpro_megatron.config.batch import BatchConfig
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.config.collector import CollectorConfig
from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.evaluation import EvaluationConfig
from minpro_megatron.config.model import ModelConfig
from minpro_megatron.config.objective import MinproConfig
from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.config.staleness import StalenessConfig
from minpro_megatron.recipes.places import ARTIFACTS

FOLDER = ARTIFACTS / "stability_study"


def run() -> RunConfig:
    """MinPRO, on-policy. Every objective has the settings of its own paper, or of arXiv:2601.22718's comparison."""
    return RunConfig(
        name="stability-study",
        num_global_steps=60,
        device="cpu",
        model=ModelConfig(hf_path=str(FOLDER / "hf"), megatron_path=str(FOLDER / "megatron"), dtype="float32"),
        data=DataConfig(train_file=str(FOLDER / "train.jsonl"), heldout_file=str(FOLDER / "heldout.jsonl")),
        objective=MinproConfig(),
        # the paper's moments and decay; the rate was chosen by the study's sweep
        optimizer=OptimizerConfig(learning_rate=2.5e-4, warmup_global_steps=4),
        batch=BatchConfig(num_prompts=16, responses_per_prompt=8, mini_batch_prompts=4, max_tokens_per_row=2048),
        sampling=SamplingConfig(max_prompt_tokens=20, max_response_tokens=20),
        staleness=StalenessConfig(delay_steps=0),
        # deterministic sampling: the same seed gives the same curve
        server=ServerConfig(engine="reference", device="cpu", dtype="float32", start_timeout_s=180),
        reward=RewardConfig(function="minpro_megatron.rewards.calculator_steps:grade"),
        collector=CollectorConfig(journal_ratios=False),
        checkpoint=CheckpointConfig(every_steps=0),
        evaluation=EvaluationConfig(num_prompts=96, samples_per_prompt=4, every_steps=5),
    )
