"""How the trainer's ranks are laid out over the mesh axes."""

from math import lcm
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.config.library_settings import DdpFields


class ParallelConfig(Section):
    """Degrees of the mesh axes; `world_size` = tensor x pipeline x context x data.

    `data = 0` selects the smallest data degree that the expert axes allow. Sequence parallelism is on exactly
    when `tensor > 1`: MoE layers need it there, and dense layers only save memory by it.
    """

    tensor: int = Field(default=1, ge=1, description="Tensor-parallel degree; above 1 sequence parallelism is on too.")
    pipeline: int = Field(default=1, ge=1, description="Number of pipeline stages.")
    virtual_pipeline: int = Field(
        default=1, ge=1, description="Number of model chunks per pipeline rank; above 1 the schedule is interleaved."
    )
    pipeline_layers: tuple[int, ...] = Field(
        default=(),
        description="Number of transformer layers of each stage, such as [12, 13, 13, 10] or 12+13+13+10. For an "
        "interleaved pipeline give the chunks in the order of the layers: every stage's first chunk, then every "
        "stage's second. An empty list divides the layers equally.",
    )
    context: int = Field(default=1, ge=1, description="Context-parallel degree: each sequence is split over it.")
    expert: int = Field(
        default=1, ge=1, description="Expert-parallel degree: the experts of a layer are split over it."
    )
    expert_tensor: int = Field(default=1, ge=1, description="Tensor-parallel degree within each expert.")
    data: int = Field(
        default=0,
        ge=0,
        description="Data-parallel degree; 0 selects the smallest one with which the expert axes fit.",
    )
    dispatcher: Literal["alltoall", "flex"] = Field(
        default="alltoall",
        description="How tokens reach the ranks of their experts: alltoall (NCCL), or flex, the kernels of DeepEP, "
        "which has to be installed. flex has not been tested on GPUs.",
    )
    numa_binding: bool = Field(
        default=True,
        description="Bind each rank to the CPUs of its GPU's NUMA node, so that pinned copies, checkpoints and "
        "optimizer states in host memory are on the GPU's socket. Only with device = cuda, and only where the machine "
        "says which CPUs these are and they are not too few for the ranks. Not tested on GPUs.",
    )
    ddp: DdpFields = Field(
        default={},
        description="Further fields of Megatron-Core's DistributedDataParallelConfig, by its names, such as "
        "parallel.ddp.bucket_size=40000000 on the command line. Fields that another setting decides are refused. The "
        "planner does not know them.",
    )

    @classmethod
    def axes(cls) -> list[str]:
        """The settings that are degrees, or numbers of layers."""
        return [name for name in cls.model_fields if name not in ("dispatcher", "numa_binding", "ddp")]

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1

    @property
    def data_size(self) -> int:
        """The data-parallel degree; 0 is resolved to the smallest one with which the expert axes fit."""
        if self.data:
            return self.data
        dense = self.tensor * self.context
        experts = self.expert * self.expert_tensor
        return lcm(dense, experts) // dense

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data_size

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """The number of layers of each model chunk, in the order of the layers: chunk i is on stage i modulo
        `pipeline`."""
        chunks = self.pipeline * self.virtual_pipeline
        return self.pipeline_layers or (num_layers // chunks,) * chunks

    def chunks_of_stage(self, stage: int) -> range:
        """The numbers of the model chunks on a pipeline stage."""
        return range(stage, self.pipeline * self.virtual_pipeline, self.pipeline)

    @field_validator("pipeline_layers", mode="before")
    @classmethod
    def _added_up(cls, value: Any) -> Any:
        """Also accepts the form of the command line, 12+13+13+10, where commas separate settings."""
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
                f"{self.virtual_pipeline} = {chunks} model chunks: give one number per chunk"
            )
        if min(layers) < 1:
            raise ValueError(
                f"{given}: every stage needs at least one layer: give numbers of at least 1, or lower pipeline"
            )
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
        if self.dispatcher == "flex" and experts == 1:
            raise ValueError(
                "dispatcher = flex exchanges tokens between ranks, but expert x expert_tensor = 1: raise expert, or "
                "set dispatcher to alltoall"
            )
        return self
