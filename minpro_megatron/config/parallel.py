"""How the trainer's ranks are laid out over the mesh axes."""

from math import lcm
from typing import Any

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section


class ParallelConfig(Section):
    """Degrees of the mesh axes; `world_size` = tensor x pipeline x context x data.

    `data = 0` means: the smallest data degree that the expert axes allow. Sequence parallelism is on exactly
    when `tensor > 1`: MoE layers need it there, and dense layers only save memory by it.
    """

    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    virtual_pipeline: int = Field(default=1, ge=1, description="model chunks a pipeline rank (interleaved schedule)")
    pipeline_layers: tuple[int, ...] = Field(
        default=(),
        description="transformer layers of each stage, such as [12, 13, 13, 10] or 12+13+13+10; of an interleaved "
        "pipeline in the order of the layers: every stage's first chunk, then every stage's second; none: equal",
    )
    context: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)
    expert_tensor: int = Field(default=1, ge=1)
    data: int = Field(default=0, ge=0)

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1

    @property
    def data_size(self) -> int:
        """The data degree, with 0 resolved to the smallest one in which the expert axes fit."""
        if self.data:
            return self.data
        dense = self.tensor * self.context
        experts = self.expert * self.expert_tensor
        return lcm(dense, experts) // dense

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data_size

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """How many of the model's layers each chunk has, in their order: chunk i is on stage i modulo `pipeline`."""
        chunks = self.pipeline * self.virtual_pipeline
        return self.pipeline_layers or (num_layers // chunks,) * chunks

    @field_validator("pipeline_layers", mode="before")
    @classmethod
    def _added_up(cls, value: Any) -> Any:
        """The form of command lines, in which commas stand between settings."""
        if isinstance(value, str):
            return value.split("+") if value else ()
        return value

    @model_validator(mode="after")
    def _pipeline_layers_fit(self) -> "ParallelConfig":
        layers, chunks = self.pipeline_layers, self.pipeline * self.virtual_pipeline
        if not layers:
            return self
        given = f"pipeline_layers = {'+'.join(map(str, layers))}"
        if len(layers) != chunks:
            raise ValueError(
                f"{given}: {len(layers)} numbers for pipeline x virtual_pipeline = {self.pipeline} x "
                f"{self.virtual_pipeline} = {chunks} runs of layers: give one for each"
            )
        if min(layers) < 1:
            raise ValueError(f"{given}: every stage needs a layer: give numbers of at least 1, or lower pipeline")
        return self

    @model_validator(mode="after")
    def _expert_axes_fit(self) -> "ParallelConfig":
        dense = self.tensor * self.context * self.data_size
        experts = self.expert * self.expert_tensor
        if dense % experts:
            raise ValueError(
                f"expert x expert_tensor = {self.expert} x {self.expert_tensor} = {experts} must divide "
                f"tensor x context x data = {self.tensor} x {self.context} x {self.data_size} = {dense}; "
                "raise data or lower expert"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline = {self.virtual_pipeline} needs pipeline > 1; set virtual_pipeline to 1"
            )
        return self
