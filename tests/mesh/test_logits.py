"""Logits on any mesh are those of transformers, also where the model's shapes are odd for the mesh."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.reference import COMMON
from tests.support.long_cases import long_rows_after

pytestmark = pytest.mark.mesh

LENGTHS = (2, 37)
MIXTURE: dict[str, Any] = {"intermediate_size": 64, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
ONE_HEAD: dict[str, Any] = {**COMMON, "num_key_value_heads": 1}
MODELS = {
    "one key and value head": Qwen3Config(**ONE_HEAD, intermediate_size=64),
    "three experts a rank": Qwen3MoeConfig(**COMMON, **MIXTURE, num_experts=6, norm_topk_prob=True),
    "five layers": Qwen3MoeConfig(**{**COMMON, "num_hidden_layers": 5}, **MIXTURE, num_experts=8, norm_topk_prob=True),
    "weights of all experts": Qwen3MoeConfig(**COMMON, **MIXTURE, num_experts=8, norm_topk_prob=False),
}
CASES = [
    ("one key and value head", {"tensor": 4}),
    ("three experts a rank", {"tensor": 2, "expert": 2, "data": 1}),
    ("five layers", {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": (1, 2, 1, 1)}),
    ("weights of all experts", {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2}),
    ("one key and value head", {"tensor": 2, "context": 2, "pipeline": 2}),
    ("five layers", {"pipeline": 2, "pipeline_layers": (3, 2), "tensor": 2, "expert": 2}),
]


def _logits(mesh: Mesh, hf_path: str, sequences: list[np.ndarray]) -> list[np.ndarray]:
    from minpro_megatron.actor.logits import sequence_logits
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, torch.float32)
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    return [sequence_logits(chunks, mesh, architecture.vocab_size, ids) for ids in sequences]


@pytest.mark.parametrize(("name", "parallel"), long_rows_after(4, CASES), ids=str)
def test_logits_equal_transformers(name: str, parallel: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MODELS[name]
    model = Qwen3MoeForCausalLM(config) if isinstance(config, Qwen3MoeConfig) else Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.mul_(5)  # large enough that attention and routing matter
    model.save_pretrained(tmp_path)
    random = np.random.default_rng(0)
    sequences = [random.integers(0, config.vocab_size, length).astype(np.int32) for length in LENGTHS]
    with torch.no_grad():
        expected = [model(torch.from_numpy(ids).long()[None]).logits[0].numpy() for ids in sequences]
    for found in run_mesh(_logits, str(tmp_path), sequences, **parallel):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
            assert np.abs(other).max() > 1
