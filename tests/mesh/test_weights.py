"""Weights pass from Hugging Face files through any mesh, and from mesh to mesh, without a changed bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minpro_megatron.checkpoints.sharded_files import read_metadata
from minpro_megatron.conversion.convert import to_hf, to_megatron
from minpro_megatron.files.replacement import begin_folder
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.passed_weights import EMBEDDING, OUTPUT, assert_bit_equal, no_display, through_the_mesh
from tests.mesh.reference import make_model, saved_tensors

pytestmark = pytest.mark.mesh

SAVED_ON = {"moe": {"pipeline": 2, "expert": 2, "tensor": 2}, "dense": {"data": 2}, "tied": {}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
    """Folder and tensors of a mixture, a dense and a tied dense model."""
    made = {}
    for kind in SAVED_ON:
        model = make_model(kind)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        made[kind] = (folder, {name: tensor.numpy() for name, tensor in saved_tensors(model).items()})
    return made


@pytest.fixture(scope="module")
def saved(models: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """For each model: a Megatron checkpoint, and what the ranks of the mesh that saved it found."""
    made = {}
    for kind, degrees in SAVED_ON.items():
        path = tmp_path_factory.mktemp(f"{kind}-megatron") / "checkpoint"
        # what a crash while saving leaves behind must neither be taken for a checkpoint nor get into one
        (begin_folder(path) / "left_over").write_text("")
        ranks = run_mesh(through_the_mesh, models[kind][0], [None], path, **degrees)
        made[kind] = (path, [rank[0] for rank in ranks])
    return made


@pytest.fixture(scope="module")
def converted(models: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each model: the Megatron checkpoint that the conversion writes, without a mesh."""
    made = {}
    for kind in SAVED_ON:
        made[kind] = tmp_path_factory.mktemp(f"{kind}-converted") / "checkpoint"
        to_megatron(models[kind][0], made[kind], no_display)
    return made


def assert_ends_are(ranks: list[dict[str, Any]], expected: dict[str, np.ndarray], tensor_size: int) -> None:
    """Embedding and output layer of every rank are its rows of the vocabulary, padded with zeros."""
    embedding = expected["model.embed_tokens.weight"]
    for rank in ranks:
        for name, found in rank["ends"].items():
            rows = embedding if name == EMBEDDING else expected.get("lm_head.weight", embedding)
            padded = np.concatenate([rows, np.zeros((128 - len(rows), rows.shape[1]), rows.dtype)])
            np.testing.assert_array_equal(found, np.split(padded, tensor_size)[rank["tensor_rank"]], err_msg=name)


@pytest.mark.parametrize("kind", SAVED_ON)
def test_hugging_face_weights_come_back_from_the_mesh_that_saves_them(kind: str, models: dict, saved: dict) -> None:
    path, ranks = saved[kind]
    assert_bit_equal(ranks, models[kind][1])
    assert_ends_are(ranks, models[kind][1], SAVED_ON[kind].get("tensor", 1))
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint"]
    assert not (path / "left_over").exists()


@pytest.mark.parametrize(
    ("kind", "degrees"),
    [
        ("moe", {}),
        pytest.param("moe", {"pipeline": 2, "virtual_pipeline": 2}, marks=pytest.mark.long),
        ("moe", {"tensor": 2, "expert_tensor": 2, "data": 2, "expert": 2}),
        pytest.param("moe", {"expert": 4, "context": 2}, marks=pytest.mark.long),
        pytest.param("dense", {"tensor": 2, "context": 2}, marks=pytest.mark.long),
        ("tied", {"pipeline": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_all_forms_load_on_another_mesh(
    kind: str, degrees: dict[str, int], models: dict, saved: dict, converted: dict
) -> None:
    folder, expected = models[kind]
    ranks = run_mesh(through_the_mesh, folder, [None, saved[kind][0], converted[kind]], None, **degrees)
    for source in (0, 1, 2):
        found = [rank[source] for rank in ranks]
        assert_bit_equal(found, expected)
        assert_ends_are(found, expected, degrees.get("tensor", 1))
        # the last stage of a tied model holds a copy of the embedding, which rank 0 does not gather
        on_last_stage = [rank for rank in found if OUTPUT in rank["ends"]]
        assert len(on_last_stage) == len(ranks) // degrees.get("pipeline", 1)


@pytest.mark.parametrize("kind", SAVED_ON)
def test_the_conversion_writes_what_megatron_itself_would(kind: str, saved: dict, converted: dict) -> None:
    def described(path: Path) -> dict[str, Any]:
        stored = read_metadata(path).state_dict_metadata
        return {
            key: (item.size, item.properties) if isinstance(item, TensorStorageMetadata) else "object"
            for key, item in stored.items()
        }

    assert described(converted[kind]) == described(saved[kind][0])


@pytest.mark.parametrize("kind", SAVED_ON)
def test_the_files_come_back_byte_for_byte_from_what_a_mesh_saved(
    kind: str, models: dict, saved: dict, tmp_path: Path
) -> None:
    to_hf(saved[kind][0], tmp_path / "hf", no_display, verify=True)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (models[kind][0] / name).read_bytes(), name


def _refusals_on_rank(mesh: Mesh, hf_path: Path, checkpoint: Path) -> None:
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.checkpoints.converted_model import load_weights
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, torch.float32)
    with pytest.raises(ValueError, match=r"there is no manifest.json, .*; run `minpro convert"):
        load_weights(chunks, architecture, checkpoint.with_name("absent"), mesh)
    longer = replace(architecture, num_layers=5)
    larger_model = build_model(longer, mesh, torch.float32)
    with pytest.raises(ValueError, match=r"num_layers = 4, but the Hugging Face config.json says 5; convert that"):
        load_weights(larger_model, longer, checkpoint, mesh)
    with (checkpoint / ".metadata").open("r+b") as file:
        file.write(b"?")
    with pytest.raises(ValueError, match=r"\.metadata: its SHA-256 is not the one in manifest.json; convert again"):
        load_weights(chunks, architecture, checkpoint, mesh)

    reader = HfReader(hf_path)
    with pytest.raises(ValueError, match=r"33 tensors are missing for Qwen3MoeForCausalLM: model.layers.4"):
        load_hf_tensors(larger_model, longer, mesh, reader)
    shorter = replace(architecture, num_layers=3)
    with pytest.raises(ValueError, match=r"33 tensors are not in the table of Qwen3MoeForCausalLM: model.layers.3"):
        load_hf_tensors(build_model(shorter, mesh, torch.float32), shorter, mesh, reader)
    with pytest.raises(ValueError, match=r"q_proj.weight: shape \(64, 32\), but config.json requires \(\d+, 32\)"):
        load_hf_tensors(chunks, replace(architecture, num_attention_heads=2), mesh, reader)
    with pytest.raises(ValueError, match=r"no Hugging Face tensor maps to decoder.layers.4"):
        load_hf_tensors(larger_model, architecture, mesh, reader)


def test_weights_that_do_not_belong_to_the_config_are_refused(models: dict, tmp_path: Path) -> None:
    to_megatron(models["moe"][0], tmp_path / "checkpoint", no_display)
    run_mesh(_refusals_on_rank, models["moe"][0], tmp_path / "checkpoint")


def _cuts_on_rank(mesh: Mesh, hf_path: Path, changes: list[tuple[dict[str, Any], str]]) -> None:
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.models.architecture import read_architecture

    for changed, message in changes:
        with pytest.raises(ValueError, match=message):
            build_model(replace(read_architecture(hf_path), **changed), mesh, torch.float32)


def test_models_that_the_mesh_cannot_cut_are_refused(models: dict) -> None:
    dense = [
        ({"num_attention_heads": 3}, r"parallel.tensor = 2 must divide the model's num_attention_heads = 3"),
        ({"num_query_groups": 3}, r"parallel.tensor = 2 must divide the model's num_key_value_heads = 3"),
        ({"ffn_hidden_size": 63}, r"parallel.tensor = 2 must divide the model's intermediate_size = 63"),
    ]
    run_mesh(_cuts_on_rank, models["dense"][0], dense, tensor=2)
    mixture = [
        ({"num_experts": 7}, r"parallel.expert = 2 must divide the model's num_experts = 7"),
        ({"num_layers": 3}, r"pipeline x virtual_pipeline = 2 must divide the model's layers = 3"),
        ({"num_experts": 0}, r"parallel.expert = 2: .* has no experts; set it to 1"),
    ]
    run_mesh(_cuts_on_rank, models["moe"][0], mixture, data=2, expert=2, pipeline=2)
