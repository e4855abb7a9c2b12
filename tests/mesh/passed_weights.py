"""Weights that pass through a mesh and are compared bit by bit."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minpro_megatron.parallel.mesh import Mesh

BUCKET_BYTES = 3000  # less than most tensors: many buckets, and tensors larger than one
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def no_display(what: str, num_bytes: int) -> nullcontext:
    return nullcontext(lambda num_bytes: None)


def through_the_mesh(
    mesh: Mesh, hf_path: Path, sources: list[Path | None], save_to: Path | None
) -> list[dict[str, Any]]:
    """For each source (a checkpoint, or None: Hugging Face): load, save if told to, gather to rank 0."""
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.checkpoints.converted_model import load_weights, save_weights
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.publishing.gather import WeightGatherer
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import global_parameters, load_hf_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, torch.float32)
    parameters = global_parameters(chunks, architecture.num_experts, mesh)
    gatherer = WeightGatherer(chunks, architecture, mesh)
    found = []
    for source in sources:
        for parameter in parameters.values():
            parameter.data.fill_(torch.nan)  # what is not loaded stays NaN
        if source:
            load_weights(chunks, architecture, source, mesh)
        else:
            load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
        if save_to:
            save_weights(chunks, architecture, save_to, mesh, hf_path)
        buckets = list(gatherer.buckets(BUCKET_BYTES))
        ends = [name for name in (EMBEDDING, OUTPUT) if name in parameters]
        found.append(
            {
                "gathered": {name: tensor.numpy().copy() for bucket in buckets for name, tensor in bucket},
                "buckets": [sum(tensor.nbytes for _, tensor in bucket) for bucket in buckets],
                "finite": all(bool(parameter.isfinite().all()) for parameter in parameters.values()),
                "ends": {name: parameters[name].detach().numpy().copy() for name in ends},
                "tensor_rank": mesh.tensor.rank(),
            }
        )
    return found


def assert_bit_equal(ranks: list[dict[str, Any]], expected: dict[str, np.ndarray]) -> None:
    gathered = ranks[0]["gathered"]
    assert gathered.keys() == expected.keys()
    for name, tensor in expected.items():
        assert gathered[name].shape == tensor.shape
        assert gathered[name].tobytes() == tensor.tobytes(), name
    assert all(rank["finite"] for rank in ranks)
    assert not any(rank["gathered"] for rank in ranks[1:])
    # a bucket is closed by the parameter that fills it; the largest one is made of two of the files' tensors
    largest = max(tensor.nbytes for tensor in expected.values())
    assert max(ranks[0]["buckets"]) < BUCKET_BYTES + 2 * largest
    assert {len(rank["buckets"]) for rank in ranks} == {len(ranks[0]["buckets"])}
