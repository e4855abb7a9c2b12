"""The planner's memory of a trainer rank against the tensors of real updates, counted as they live and die."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.planning.activations import Row
from minpro_megatron.planning.memory import rank_memory
from minpro_megatron.publishing.canary_count import most_canaries
from tests.mesh.harness import run_mesh
from tests.mesh.live_bytes import LiveBytes
from tests.mesh.planned_models import architecture

pytestmark = pytest.mark.mesh

PROMPT_TOKENS, SEQUENCE_TOKENS, ROW_TOKENS = 16, 128, 256
MAX_ERROR = 0.1  # of each quantity
MOST_PLANNED = 2.5  # for canaries, with torch's layers: what a layer would keep for a backward pass
QWEN2: dict[str, Any] = {"name": "Qwen2ForCausalLM", "qkv_bias": True, "qk_norm": False}
GLM: dict[str, Any] = {
    "name": "Glm4MoeForCausalLM",
    "qkv_bias": True,
    "dense_layers": 1,
    "shared_ffn_hidden_size": 48,
    "sigmoid_routing": True,
    "rotary_share": 0.5,
}
FAMILIES: list[tuple[dict[str, Any], dict[str, int]]] = [
    (QWEN2, {}),
    (QWEN2, {"tensor": 2, "context": 2}),
    (GLM, {"expert": 2}),
    (GLM, {"tensor": 2, "expert": 2, "pipeline": 2}),
]


def run_config(degrees: dict[str, int], recompute: str) -> RunConfig:
    return parse_run_config(
        {
            "name": "planned-memory",
            "device": "cpu",
            "model": {"hf_path": "unused", "megatron_path": "unused", "dtype": "float32", "recompute": recompute},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "parallel": degrees,
            "sampling": {
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_response_tokens": SEQUENCE_TOKENS - PROMPT_TOKENS,
            },
            "batch": {"num_prompts": 8, "mini_batch_prompts": 8, "max_tokens_per_row": ROW_TOKENS},
        }
    )


def sequences(count: int, vocab_size: int) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    response = SEQUENCE_TOKENS - PROMPT_TOKENS
    return [
        TokenSequence(
            prompt_ids=random.integers(0, vocab_size, PROMPT_TOKENS, dtype=np.int32),
            response_ids=random.integers(0, vocab_size, response, dtype=np.int32),
            loss_mask=np.ones(response, np.float32),
            behavior_log_probs=np.full(response, -6, np.float32),
            rollout_log_probs=np.full(response, -6, np.float32),
            advantage=1.0 if index % 2 else -1.0,
            first_slot=index * response,
        )
        for index in range(count)
    ]


@dataclass(frozen=True)
class Found:
    """Bytes of one rank."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int  # the most that lived beside these during forward and backward
    canaries: int  # and while the most canaries were scored


def _measure(mesh: Mesh, config: RunConfig, a: Architecture, batch: list[TokenSequence]) -> Found:
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy

    torch.manual_seed(0)
    chunks = build_model(a, mesh, torch.float32, ModelFeatures(config.model.recompute))
    parameters: list[Any] = [parameter for chunk in chunks for parameter in chunk.parameters()]
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() == 1:  # of a norm
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    policy = Policy(config, a, chunks, mesh)
    policy.update(batch, 1e-6)  # makes the moments
    live = LiveBytes()
    with live:
        policy.accumulate_gradient(batch)
    most, scoring = most_canaries(config), LiveBytes()
    with scoring:
        policy.score_canaries([([0] * most.prompt_tokens, [0] * most.continuation_tokens)] * most.count)
    return Found(
        stage=mesh.pipeline.rank(),
        weights=_storage_bytes(parameters),
        gradients=_storage_bytes([parameter.main_grad for parameter in parameters if parameter.requires_grad]),
        optimizer=_moment_bytes(policy._optimizer),
        activations=live.peak,
        canaries=scoring.peak,
    )


def _storage_bytes(tensors: list[Any]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _moment_bytes(optimizer: Any) -> int:
    parts = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    states = [state for part in parts for state in part.state.values()]
    return sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(
    ("mixture", "degrees", "recompute", "rows"),
    [
        pytest.param(False, {}, "none", 1, marks=pytest.mark.long),
        (False, {"context": 2}, "none", 1),
        pytest.param(False, {"tensor": 2, "data": 2}, "selective", 2, marks=pytest.mark.long),
        pytest.param(False, {"pipeline": 2}, "none", 4, marks=pytest.mark.long),
        pytest.param(True, {"expert": 2}, "full", 2, marks=pytest.mark.long),
        (True, {"tensor": 2, "expert": 2}, "none", 1),
        pytest.param(True, {"pipeline": 2, "virtual_pipeline": 2}, "none", 4, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_planned_bytes_are_those_that_live(mixture: bool, degrees: dict[str, int], recompute: str, rows: int) -> None:
    compare_with_plan(architecture(mixture), degrees, recompute, rows)


@pytest.mark.long
@pytest.mark.parametrize(("changes", "degrees"), FAMILIES, ids=str)
def test_planned_bytes_of_other_families_are_those_that_live(changes: dict[str, Any], degrees: dict[str, int]) -> None:
    compare_with_plan(architecture(mixture="dense_layers" in changes, **changes), degrees, "none", rows=2)


def compare_with_plan(a: Architecture, degrees: dict[str, int], recompute: str, rows: int) -> None:
    config = run_config(degrees, recompute)
    batch = sequences(rows * ROW_TOKENS // SEQUENCE_TOKENS, a.vocab_size)
    ranks = run_mesh(_measure, config, a, batch, **degrees)
    row = Row(ROW_TOKENS, SEQUENCE_TOKENS)
    for stage in range(config.parallel.pipeline):
        own = [rank for rank in ranks if rank.stage == stage]
        planned = rank_memory(config, a, row, rows // config.parallel.data_size, stage, imbalance=1.0)
        # how many rows a rank's experts get differs from rank to rank; their mean does not
        expected = {
            "weights": planned.weights,
            "gradients": planned.gradients,
            "optimizer": planned.optimizer,
            "activations": planned.activations.peak,
        }
        for name, size in expected.items():
            found = sum(getattr(rank, name) for rank in own) / len(own)
            print(f"stage {stage}, {name}: {size:,} planned, {found:,.0f} found, {size / found - 1:+.1%}")
            assert size == pytest.approx(found, rel=MAX_ERROR)
        canaries = max(rank.canaries for rank in own)
        print(f"stage {stage}, canaries: {planned.canaries:,} planned at most, {canaries:,} found")
        assert canaries <= planned.canaries < MOST_PLANNED * canaries
