"""How the trainer's ranks are laid out over the mesh axes."""

from math import lcm

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section


class ParallelConfig(Section):
    """Degrees of the mesh axes; `world_size` = tensor x pipeline x context x data.

    `data = 0` means: the smallest data degree that the expert axes allow. Sequence parallelism is on exactly
    when `tensor > 1`: MoE layers need it there, and dense layers only save memory by it.
    """

    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    virtual_pipeline: int = Field(default=1, ge=1, description="model chunks a pipeline rank (interleaved schedule)")
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
