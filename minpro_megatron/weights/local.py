"""This rank's parameters under their global names, and loading them from Hugging Face tensors."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.hf_files import HfReader
from minpro_megatron.weights.table import Entry, check_names, entries, table_name

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def global_parameters(chunks: Sequence[torch.nn.Module], num_experts: int, mesh: Mesh) -> dict[str, torch.nn.Parameter]:
    """{global Megatron name: this rank's shard} over its model chunks (unwrapped GPTModels), whatever their backend.

    A stage numbers its layers, and a rank its experts, from 0; in global names both are numbered over the whole model.
    """
    first_expert = mesh.expert.rank() * (num_experts // mesh.expert.size())
    named = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            named[_with_global_layer(table_name(name, first_expert), chunk)] = parameter
    return named


def _with_global_layer(name: str, chunk: torch.nn.Module) -> str:
    match = _LAYER.match(name)
    if match is None:
        return name
    layer: Any = chunk.get_submodule(match[0].rstrip("."))
    return _LAYER.sub(f"decoder.layers.{layer.layer_number - 1}.", name)  # Megatron counts layer_number from 1


def axis_rank_and_size(entry: Entry, mesh: Mesh) -> tuple[int, int]:
    group = mesh.tensor if entry.axis == "tensor" else mesh.expert_tensor
    return group.rank(), group.size()


@torch.no_grad()
def load_hf_tensors(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, mesh: Mesh, reader: HfReader
) -> None:
    """Fill this rank's parameters from a Hugging Face folder.

    Raises ValueError if the names or shapes of the folder's tensors differ from the table, or if a parameter has no
    tensor: no weight is skipped, and no parameter stays uninitialized.
    """
    reader.refuse_quantized()
    check_names(architecture, reader.names(), str(reader.path))
    parameters = global_parameters(chunks, architecture.num_experts, mesh)
    missing = set(parameters)
    for entry in entries(architecture):
        parameter = parameters.get(entry.megatron)
        if parameter is None and architecture.tied_embeddings and entry.layer is None:
            parameter = _tied_output(parameters, entry)
        if parameter is None:
            continue
        full = entry.join([reader.read(name) for name in entry.hf])
        parameter.copy_(entry.split.shard(full, *axis_rank_and_size(entry, mesh)))
        missing.discard(entry.megatron)
        if architecture.tied_embeddings and entry.megatron.startswith("embedding."):
            missing.discard("output_layer.weight")
    if missing:
        raise UserError(f"no Hugging Face tensor maps to {', '.join(sorted(missing))}")


def _tied_output(parameters: dict[str, torch.nn.Parameter], entry: Entry) -> torch.nn.Parameter | None:
    """The copy of the embedding that a tied model has on the last pipeline stage, if that is not also the first."""
    return parameters.get("output_layer.weight") if entry.megatron.startswith("embedding.") else None
