"""The parameters and memory of a model on every rank of a mesh, from its config.json alone.

The sizes come from the table and the splits that conversion uses: a plan counts what a conversion would load. Layers
are distributed over pipeline stages as in megatron-core. No model is built.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.models.architecture import Architecture, read_architecture, refuse_uneven_cuts
from minpro_megatron.weights.hf_files import HfReader
from minpro_megatron.weights.splits import Split
from minpro_megatron.weights.table import Entry, Shape, coverage, entries

WEIGHT_BYTES = 2  # bfloat16
GRADIENT_BYTES = 4  # float32
OPTIMIZER_BYTES = 12  # float32: main weight and Adam's two moments


@dataclass(frozen=True)
class RankKind:
    """The memory of each of `num_ranks` identical ranks: those of the pipeline stages `stages`, counted from 0.

    The distributed optimizer shards the states of a rank's parameters over the ranks that have the same parameters:
    `data` x `context` ranks for most, fewer for experts. The padding of Megatron's buffers is less than a megabyte and
    is ignored.
    """

    stages: tuple[int, ...]
    num_ranks: int
    layers: int
    parameters: int
    expert_parameters: int  # included in `parameters`
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Plan:
    architecture: Architecture
    parallel: ParallelConfig
    hf_tensors_covered: int
    hf_tensors_missed: list[str]  # in the model but not in the table
    hf_tensors_absent: list[str]  # in the table but not in the model
    parameters: int  # of the model in Hugging Face's format
    optimizer_ranks: int  # the number of ranks over which the optimizer's states are sharded
    expert_optimizer_ranks: int
    rank_kinds: list[RankKind]

    def as_json(self) -> str:
        mesh = {"data": self.parallel.data_size, "world_size": self.parallel.world_size}
        kinds = [asdict(kind) | {"total_bytes": kind.total_bytes} for kind in self.rank_kinds]
        content = vars(self) | {
            "architecture": asdict(self.architecture),
            "parallel": self.parallel.model_dump() | mesh,
            "rank_kinds": kinds,
        }
        return json.dumps(content, indent=2)


def make_plan(hf: Path, parallel: ParallelConfig) -> Plan:
    """The plan of the model in the folder `hf`, of which only config.json is needed.

    Its tensors are those of the weight files if there are any, else those that transformers would write, also where
    the folder has an index of files that were not downloaded.
    Raises ValueError for an unknown architecture, or a mesh that does not divide the model."""
    architecture = read_architecture(hf)
    refuse_uneven_cuts(architecture, parallel)
    if any(hf.glob("*.safetensors")):
        shapes = {name: tensor.shape for name, tensor in HfReader(hf).tensors.items()}
    else:
        shapes = transformers_tensors(hf)
    found = coverage(architecture, shapes)
    dense, experts = optimizer_degrees(parallel)
    return Plan(
        architecture=architecture,
        parallel=parallel,
        hf_tensors_covered=len(found.covered),
        hf_tensors_missed=found.missed,
        hf_tensors_absent=found.absent,
        parameters=sum(math.prod(shapes[name]) for name in found.covered),
        optimizer_ranks=dense,
        expert_optimizer_ranks=experts,
        rank_kinds=rank_kinds(architecture, parallel),
    )


def transformers_tensors(hf: Path) -> dict[str, Shape]:
    """Names and shapes of the tensors that transformers writes for the folder's config.json, without making any."""
    # imported here: the import takes seconds, and only a folder without weights needs it
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf))
    tied = set(getattr(model, "all_tied_weights_keys", ()))  # saved only once, under the other name
    named = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    # in memory transformers fuses the experts of a layer
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, named).items()}


def optimizer_degrees(parallel: ParallelConfig) -> tuple[int, int]:
    """The numbers of ranks over which the optimizer's states are sharded: for most parameters, for experts."""
    dense = parallel.data_size * parallel.context
    return dense, parallel.tensor * dense // (parallel.expert * parallel.expert_tensor)


def stage_of_layer(layer: int, num_layers: int, parallel: ParallelConfig) -> int:
    """The pipeline stage of the layer. Each stage has `virtual_pipeline` chunks of consecutive layers."""
    ends = accumulate(parallel.chunk_layers(num_layers))
    return next(chunk for chunk, end in enumerate(ends) if layer < end) % parallel.pipeline


def parameters_of_stage(architecture: Architecture, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """(all parameters, expert parameters) of each rank of a stage: the same for its tensor, expert and data ranks."""
    shard_sizes: dict[tuple[str, Split, tuple[Shape, ...]], int] = {}

    def shard_size(entry: Entry) -> int:
        alike = (entry.axis, entry.split, entry.shapes)
        if alike not in shard_sizes:
            size = parallel.tensor if entry.axis == "tensor" else parallel.expert_tensor
            shard_sizes[alike] = math.prod(entry.shard_shape(size))
        return shard_sizes[alike]

    ours = [entry for entry in entries(architecture) if stage in _stages(entry, architecture, parallel)]
    dense = sum(shard_size(entry) for entry in ours if entry.expert is None)
    experts = sum(shard_size(entry) for entry in ours if entry.expert is not None) // parallel.expert
    return dense + experts, experts


def _stages(entry: Entry, architecture: Architecture, parallel: ParallelConfig) -> Sequence[int]:
    last = parallel.pipeline - 1
    if entry.layer is not None:
        return (stage_of_layer(entry.layer, architecture.num_layers, parallel),)
    if not entry.megatron.startswith("embedding"):
        return (last,)
    return (0, last) if architecture.tied_embeddings else (0,)  # the last stage's output layer is a copy


def rank_kinds(architecture: Architecture, parallel: ParallelConfig) -> list[RankKind]:
    """One RankKind for each set of pipeline stages whose ranks are identical."""
    dense_ranks, expert_ranks = optimizer_degrees(parallel)
    layers_of_chunks = parallel.chunk_layers(architecture.num_layers)
    stages_with: dict[tuple[int, int, int], list[int]] = {}
    for stage in range(parallel.pipeline):
        layers = sum(layers_of_chunks[stage :: parallel.pipeline])
        stages_with.setdefault((layers, *parameters_of_stage(architecture, parallel, stage)), []).append(stage)
    kinds = []
    for (layers, parameters, experts), stages in stages_with.items():
        states = -(-(parameters - experts) // dense_ranks) + -(-experts // expert_ranks)
        kinds.append(
            RankKind(
                stages=tuple(stages),
                num_ranks=len(stages) * parallel.world_size // parallel.pipeline,
                layers=layers,
                parameters=parameters,
                expert_parameters=experts,
                weight_bytes=WEIGHT_BYTES * parameters,
                gradient_bytes=GRADIENT_BYTES * parameters,
                optimizer_bytes=OPTIMIZER_BYTES * states,
            )
        )
    return kinds
