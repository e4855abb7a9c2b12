"""Held-out evaluations during the run."""

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.config.path_type import InputPath


class BenchmarkConfig(Section):
    """A file of prompts that is evaluated in addition to the held-out prompts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name in metrics: evaluation/.../<name>.")
    file: InputPath = Field(description="JSON Lines file in the format of data.heldout_file.")
    samples_per_prompt: int = Field(default=2, ge=1, description="Number of responses per prompt.")
    num_prompts: int | None = Field(
        default=None, ge=1, description="Number of prompts, from the beginning of the file; null uses all."
    )


class EvaluationConfig(Section):
    """pass@1 on held-out prompts and benchmarks at the first and the last policy version (and every `every_steps`).

    Weights are not replaced during an evaluation: with many samples the trainer waits. Samples are requested in groups
    of batch.responses_per_prompt, after the training groups. An evaluation that fails raises an alarm and has no score.
    """

    num_prompts: int = Field(
        default=128, ge=1, description="Number of held-out prompts, from the beginning of data.heldout_file."
    )
    samples_per_prompt: int = Field(default=8, ge=1, description="Number of responses per held-out prompt.")
    every_steps: int = Field(
        default=0,
        ge=0,
        description="Also evaluate every policy version that is a multiple of this; 0 evaluates only the first and the "
        "last one.",
    )
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of evaluations.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Top-p of the sampling of evaluations; 1 means no limit.")
    benchmarks: list[BenchmarkConfig] = Field(
        default=[],
        description='Further files of prompts to evaluate, such as [{"name": "aime24", "file": "data/aime24.jsonl", '
        '"samples_per_prompt": 8}].',
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "EvaluationConfig":
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"benchmarks: the names {names} must differ")
        return self
