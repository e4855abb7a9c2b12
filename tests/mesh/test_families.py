"""Each family besides Qwen3: steps on meshes are those of transformers, and weights pass without a changed bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.checkpoints.sharded_files import read_metadata
from minpro_megatron.conversion.convert import to_hf, to_megatron
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.passed_weights import assert_bit_equal, no_display, through_the_mesh
from tests.mesh.ragged_batch import in_order, shuffled
from tests.mesh.reference import (
    FAMILIES,
    biases_of_choice,
    make_model,
    minpro_loss,
    reference_step,
    saved_tensors,
)
from tests.mesh.steps import LEARNING_RATE, TEMPERATURE, differences, loaded_model, step_config, take_steps
from tests.support.long_cases import long_after, long_rows_after

pytestmark = pytest.mark.mesh

# The first mesh of a family: tensor ranks with sequence parallelism, and context ranks in rows of several sequences.
MESHES: dict[str, list[dict[str, Any]]] = {
    "qwen2": [
        {"tensor": 2, "context": 2},
        {"pipeline": 2, "pipeline_layers": (3, 1), "data": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2},
        {"tensor": 4},  # two ranks compute the same key and value head
        {},
    ],
    "llama": [
        {"context": 2, "tensor": 2},
        {"pipeline": 3, "data": 2},
        {"pipeline": 2, "pipeline_layers": (2, 1), "context": 2},
    ],
    "yarn": [
        {"context": 2, "tensor": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "context": 2},
        {"tensor": 4},
    ],
    "glm": [
        {"tensor": 2, "context": 2, "expert": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2},  # the first chunk has no layer with experts
        {"pipeline": 2, "pipeline_layers": (3, 1), "tensor": 2, "expert_tensor": 2},
        {"expert": 3},
    ],
    "glm air": [
        {"pipeline": 3, "tensor": 2, "expert": 2},
        {"context": 2, "expert": 2},
    ],
}
STEPS = [
    row
    for family, meshes in MESHES.items()
    for row in long_rows_after(1, [(family, mesh, place % 2 == 0) for place, mesh in enumerate(meshes)])
]
SAVED_ON: dict[str, dict[str, int]] = {
    "qwen2": {"tensor": 2, "pipeline": 2},
    "llama": {"pipeline": 3},
    "yarn": {"tensor": 2, "data": 2},
    "glm": {"tensor": 2, "pipeline": 2, "expert": 2},
    "glm air": {"expert": 2, "pipeline": 3},
}
LENGTHS = (2, 37)


@pytest.mark.parametrize(("family", "parallel", "packing"), STEPS, ids=str)
def test_a_step_equals_transformers(family: str, parallel: dict[str, Any], packing: bool, starts: dict) -> None:
    start = starts[family]
    config = step_config(parallel, packing=packing)
    expected = reference_step(
        start.model, in_order(start.groups), minpro_loss("token_mean"), TEMPERATURE, LEARNING_RATE, config.optimizer
    )
    layout = (config, shuffled(start.groups, seed=1))
    step = run_mesh(take_steps, start.hf_path, [layout], **config.parallel.model_dump())[0][0]
    assert differences(step, expected).breaches == []


def _logits(mesh: Mesh, hf_path: str, sequences: list[np.ndarray]) -> list[np.ndarray]:
    from minpro_megatron.actor.logits import sequence_logits

    architecture, chunks = loaded_model(mesh, hf_path)
    return [sequence_logits(chunks, mesh, architecture.vocab_size, ids) for ids in sequences]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, starts: dict) -> None:
    start, random = starts[family], np.random.default_rng(0)
    sequences = [random.integers(0, start.model.config.vocab_size, length).astype(np.int32) for length in LENGTHS]
    with torch.no_grad():
        expected = [start.model(torch.from_numpy(ids).long()[None]).logits[0].numpy() for ids in sequences]
    for found in run_mesh(_logits, start.hf_path, sequences, tensor=2, context=2):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
            assert np.abs(other).max() > 1


def _in_bfloat16(mesh: Mesh, hf_path: Path, saved: Path) -> list[dict[str, tuple[torch.dtype, bytes]]]:
    """The model from the Hugging Face folder and from a checkpoint of itself, as rank 0 gathers it."""
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.checkpoints.converted_model import load_weights, save_weights
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.publishing.gather import WeightGatherer
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, torch.bfloat16)
    gatherer, found = WeightGatherer(chunks, architecture, mesh), []
    for load in ("files", "checkpoint"):
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.data.fill_(torch.nan)
        if load == "files":
            load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
            save_weights(chunks, architecture, saved, mesh, hf_path)
        else:
            load_weights(chunks, architecture, saved, mesh)
        tensors = [pair for bucket in gatherer.buckets(3000) for pair in bucket]
        found.append({name: (one.dtype, one.contiguous().view(torch.uint8).numpy().tobytes()) for name, one in tensors})
    return found


@pytest.mark.parametrize(
    "parallel", long_after(1, [{"expert": 2, "tensor": 2}, {"pipeline": 2, "tensor": 2, "expert": 2}]), ids=str
)
def test_a_float32_bias_passes_among_weights_of_bfloat16(parallel: dict[str, int], tmp_path: Path) -> None:
    folder, model = tmp_path / "hf", make_model("glm").bfloat16()
    for _, bias in biases_of_choice(model):  # as in the releases
        bias.data = torch.rand(len(bias))
    model.save_pretrained(folder)
    expected = {
        name: (one.dtype, one.view(torch.uint8).numpy().tobytes()) for name, one in saved_tensors(model).items()
    }
    assert {dtype for dtype, _ in expected.values()} == {torch.bfloat16, torch.float32}
    ranks = run_mesh(_in_bfloat16, folder, tmp_path / "saved", **parallel)
    assert ranks[0] == [expected, expected]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_pass_from_files_through_meshes_and_back(family: str, starts: dict, tmp_path: Path) -> None:
    """Published, saved by a mesh, converted, loaded on another mesh, and written back byte for byte."""
    folder = Path(starts[family].hf_path)
    expected = {name: tensor.numpy() for name, tensor in saved_tensors(starts[family].model).items()}
    saved, converted = tmp_path / "saved", tmp_path / "converted"
    assert_bit_equal(
        [rank[0] for rank in run_mesh(through_the_mesh, folder, [None], saved, **SAVED_ON[family])], expected
    )
    to_megatron(folder, converted, no_display, verify=True)
    assert read_metadata(saved).state_dict_metadata.keys() == read_metadata(converted).state_dict_metadata.keys()
    ranks = run_mesh(through_the_mesh, folder, [saved, converted], None, context=2)
    for source in (0, 1):
        assert_bit_equal([rank[source] for rank in ranks], expected)
    for name, source in (("from mesh", saved), ("from conversion", converted)):
        to_hf(source, tmp_path / name, no_display, verify=True)
        for file in ("model.safetensors", "config.json", "generation_config.json"):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes(), file
