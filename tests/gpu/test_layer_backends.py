"""Both layer backends on a GPU: torch's grouped experts against the loop, Transformer Engine against torch.

Skipped where there is no GPU. Written where there was none: the first run on one is also the first of these tests.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.actor.model import ModelFeatures, build_model
from minpro_megatron.actor.policy import Policy
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.parallel.mesh import Mesh, open_mesh
from minpro_megatron.weights.hf_files import HfReader
from minpro_megatron.weights.local import load_hf_tensors
from tests.mesh.experts import COUNTS, TOLERANCE, differences_of_experts
from tests.mesh.reference import make_model, make_sequences, model_architecture
from tests.mesh.steps import step_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
needs_transformer_engine = pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    rendezvous = f"file://{tmp_path_factory.mktemp('mesh') / 'rendezvous'}"
    with open_mesh(ParallelConfig(), "cuda", seed=1, init_method=rendezvous, rank=0, world_size=1) as mesh:
        yield mesh


def test_grouped_products_equal_the_loop_in_values_and_gradients(mesh: Mesh) -> None:
    (model,) = build_model(model_architecture("moe"), mesh, torch.bfloat16, ModelFeatures(backend="torch"))
    for counts in COUNTS:
        for name, difference in differences_of_experts(model, counts, mesh.device).items():
            assert difference <= 2 * TOLERANCE[torch.bfloat16], (counts, name)


def scores_and_norms(mesh: Mesh, backend: str, kind: str, folder: Path) -> tuple[np.ndarray, list[float]]:
    make_model(kind).save_pretrained(folder)
    architecture, sequences = read_architecture(folder), make_sequences(8, 30)
    chunks = build_model(architecture, mesh, torch.bfloat16, ModelFeatures(backend=backend))
    load_hf_tensors(chunks, architecture, mesh, HfReader(folder))
    policy: Any = Policy(step_config({}, row_tokens=128), architecture, chunks, mesh)
    scores = policy.score(sequences)
    return scores, [policy.update(sequences, 1e-6).grad_norm for _ in range(2)]


@needs_transformer_engine
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_transformer_engine_computes_what_torch_computes(kind: str, mesh: Mesh, tmp_path: Path) -> None:
    expected, expected_norms = scores_and_norms(mesh, "torch", kind, tmp_path)
    found, norms = scores_and_norms(mesh, "transformer_engine", kind, tmp_path)
    assert np.abs(found - expected).mean() < 0.02
    assert norms == pytest.approx(expected_norms, rel=0.05)
