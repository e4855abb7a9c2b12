"""A trainer's checkpoint, saved by real ranks after updates, as weights: on a mesh and as a Hugging Face folder."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from minpro_megatron.checkpoints.manifest import TrainerState
from minpro_megatron.checkpoints.resume_point import CHECKPOINTS
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.launch.export import ExportOptions, export
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_model, make_sequences
from tests.mesh.steps import loaded_model, loaded_policy, step_config

pytestmark = pytest.mark.mesh

BUCKET_BYTES = 1 << 20
SAVED_ON = {"tensor": 2, "expert": 2}
CONFIG = step_config(SAVED_ON, row_tokens=128)


def _hf_tensors(chunks: list, architecture: Any, mesh: Mesh) -> dict[str, np.ndarray]:
    """What would be published, on rank 0."""
    from minpro_megatron.publishing.gather import WeightGatherer

    gatherer = WeightGatherer(chunks, architecture, mesh)
    return {name: tensor.numpy().copy() for bucket in gatherer.buckets(BUCKET_BYTES) for name, tensor in bucket}


def _train_and_save(mesh: Mesh, hf_path: str, run_dir: str) -> dict[str, np.ndarray]:
    from minpro_megatron.checkpoints.run_checkpoints import RunCheckpoints

    architecture, policy = loaded_policy(mesh, CONFIG, hf_path)
    checkpoints = RunCheckpoints(Path(run_dir) / CHECKPOINTS, CheckpointConfig(), mesh)
    for _ in range(2):
        assert policy.update(make_sequences(8, 30), 1e-3).applied
    checkpoints.save(policy, TrainerState(policy_version=2, updates=2))
    checkpoints.finish()
    return _hf_tensors(policy.modules, architecture, mesh)


def _load(mesh: Mesh, hf_path: str, checkpoint: str) -> dict[str, np.ndarray]:
    from minpro_megatron.checkpoints.converted_model import load_weights

    architecture, chunks = loaded_model(mesh, hf_path)
    load_weights(chunks, architecture, checkpoint, mesh)
    return _hf_tensors(chunks, architecture, mesh)


def _bits(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def test_a_trainers_checkpoint_is_loaded_and_exported_bit_by_bit(tmp_path: Path) -> None:
    hf, run_dir = tmp_path / "hf", tmp_path / "run"
    make_model("moe").save_pretrained(hf)
    (hf / "tokenizer.json").write_text("the tokenizer")
    trained = _bits(run_mesh(_train_and_save, str(hf), str(run_dir), **SAVED_ON)[0])
    assert trained != _bits(load_file(hf / "model.safetensors"))
    # compare_logits and model.megatron_path read it so, on any mesh
    checkpoint = run_dir / CHECKPOINTS / "step-000002"
    assert _bits(run_mesh(_load, str(hf), str(checkpoint), pipeline=2)[0]) == trained

    model = CONFIG.model.model_copy(update={"hf_path": str(hf)})
    (run_dir / "run.json").write_text(CONFIG.model_copy(update={"model": model}).to_json())
    assert export(ExportOptions(run=run_dir, output=tmp_path / "out", version="last", verify=True)) == 0
    assert _bits(load_file(tmp_path / "out" / "model.safetensors")) == trained
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the tokenizer"
    shutil.rmtree(run_dir)  # what was exported needs the run no longer
