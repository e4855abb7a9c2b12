"""Which prompts a run trains on and is evaluated with, and how a question becomes a prompt."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.config.instructions import instruction_text
from minpro_megatron.config.path_type import InputPath
from minpro_megatron.hooks.hook import is_import_path


class DataConfig(Section):
    """The prompts: JSON Lines files of `{"id", "source", "prompt", "answer"}`, and optionally `"pass_rate"` (0 to 1),
    `"prefix"`, `"system"` and `"metadata"`."""

    train_file: InputPath = Field(description="JSON Lines file of the prompts that are trained on.")
    heldout_file: InputPath = Field(description="JSON Lines file of the held-out prompts that evaluations use.")
    accept_changed_inputs: bool = Field(
        default=False,
        description="Resume the run although the content of its data files, benchmarks, model files or hooks has "
        "changed since its first start. The report then lists what changed and when.",
    )
    instruction: str = Field(
        default="none",
        description="Instruction that surrounds each question: none, dapo, boxed (see config/instructions.py), or a "
        "text that contains {question}.",
    )
    chat_template: bool = Field(
        default=False,
        description="Present the question as the user's turn in the model's chat template; false: as plain text, for a "
        "base model.",
    )
    chat_template_arguments: dict[str, str | int | float | bool] = Field(
        default={}, description='Variables of the chat template, such as {"enable_thinking": false}.'
    )
    demonstrations: InputPath = Field(
        default="",
        description='JSON Lines file of `{"id", "prompt", "response"}`: the run trains on these responses (supervised '
        "fine-tuning, objective.name=sft) without servers, rewards and evaluations; train_file and heldout_file are "
        "not read. Empty: it trains on sampled responses.",
    )
    source_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="Relative weight of each source of train_file among the prompt groups; all sources must be named, "
        "and 0 excludes one. Empty: every prompt of the file is used once per epoch.",
    )
    min_pass_rate: float = Field(
        default=0, ge=0, le=1, description="Training prompts with a lower pass_rate are excluded."
    )
    max_pass_rate: float = Field(
        default=1,
        ge=0,
        le=1,
        description="Training prompts with a higher pass_rate are excluded. If either bound is set, prompts without a "
        "pass_rate are excluded too.",
    )
    curriculum: Literal["none", "easy_first"] = Field(
        default="none",
        description="Order of the prompts. easy_first: in the first epoch (of each source, with source_weights) "
        "prompts with a high pass_rate come first and those without one last; later epochs are shuffled. none: every "
        "epoch is shuffled.",
    )

    filter: str = Field(
        default="",
        description="Your own function as package.module:function that decides which graded groups are trained on; "
        "for a group that it drops, another prompt is sampled. batch.dynamic_sampling drops groups of equal rewards.",
    )

    @field_validator("filter")
    @classmethod
    def _filter_is_a_function(cls, path: str) -> str:
        if path and not is_import_path(path):
            raise ValueError("it must be the import path of your own function, such as package.module:function")
        return path

    @property
    def selects_by_pass_rate(self) -> bool:
        return self.min_pass_rate > 0 or self.max_pass_rate < 1

    @model_validator(mode="after")
    def _can_be_followed(self) -> "DataConfig":
        instruction_text(self.instruction)
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate = {self.min_pass_rate} exceeds max_pass_rate = {self.max_pass_rate}: no prompt is "
                "left; lower the one or raise the other"
            )
        if self.source_weights and not any(self.source_weights.values()):
            raise ValueError(f"source_weights = {self.source_weights} are all 0: no prompt is left; raise one of them")
        if self.chat_template_arguments and not self.chat_template:
            raise ValueError(
                f"chat_template_arguments = {self.chat_template_arguments} without chat_template: set chat_template to "
                "true, or remove them"
            )
        return self
