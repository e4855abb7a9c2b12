"""Plans and the layout of checkpoints against megatron-core's own models, at full size and without any weights.

One process stands for each rank of the mesh in turn: its process groups are made of torch's "fake" backend, and the
model's parameters are on the meta device.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from minpro_megatron.checkpoints.sharded_files import place
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.models.architecture import Architecture, read_architecture
from minpro_megatron.models.known_models.find import known_config
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.plan import RankKind, make_plan, rank_kinds
from minpro_megatron.weights.table import entries
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_model
from tests.support.long_cases import long_after
from tests.support.released_configs import QWEN3_0_6B, QWEN3_8B, QWEN3_14B, QWEN3_30B_A3B

pytestmark = pytest.mark.mesh

RELEASED = {
    "30B-A3B": QWEN3_30B_A3B,
    "8B": QWEN3_8B,
    "14B": QWEN3_14B,
    "0.6B": QWEN3_0_6B,
    "Qwen2.5-7B": known_config("qwen2.5-7b"),
    "Llama-3.2-1B": known_config("llama-3.2-1b"),
}
MESHES = [
    ("30B-A3B", {"tensor": 4, "pipeline": 2, "expert": 8, "context": 2}),
    pytest.param("30B-A3B", {"expert": 8}, marks=pytest.mark.long),
    # more tensor ranks than key and value heads
    pytest.param("30B-A3B", {"tensor": 8, "expert": 8}, marks=pytest.mark.long),
    pytest.param(
        "30B-A3B",
        {"tensor": 2, "pipeline": 4, "virtual_pipeline": 2, "expert": 4, "expert_tensor": 2, "data": 8},
        marks=pytest.mark.long,
    ),
    pytest.param(
        "30B-A3B",
        {"tensor": 2, "pipeline": 3, "expert": 8, "data": 4, "pipeline_layers": (15, 18, 15)},
        marks=pytest.mark.long,
    ),
    ("0.6B", {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": (5, 8, 8, 7)}),  # tied embeddings
    pytest.param("8B", {"tensor": 4, "context": 2}, marks=pytest.mark.long),
    pytest.param("14B", {"tensor": 8, "pipeline": 4, "data": 2}, marks=pytest.mark.long),
    pytest.param("0.6B", {"tensor": 2, "pipeline": 2}, marks=pytest.mark.long),
    pytest.param("Qwen2.5-7B", {"tensor": 4, "pipeline": 2}, marks=pytest.mark.long),  # biases
    pytest.param("Llama-3.2-1B", {"tensor": 2, "pipeline": 2}, marks=pytest.mark.long),
]


@contextmanager
def rank_of(parallel: ParallelConfig, rank: int) -> Iterator[Mesh]:
    """The mesh as rank `rank` sees it, on the meta device, in place of the mesh that this process is in."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from minpro_megatron.parallel import mesh

    new_group, meta = dist.new_group, torch.device("meta")

    def fake_group(*arguments: Any, **options: Any) -> Any:
        return new_group(*arguments, **{**options, "backend": "fake"})

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=parallel.world_size, store=FakeStore())
    with mock.patch.object(dist, "new_group", fake_group), mock.patch("torch.cuda.current_device", return_value=meta):
        yield mesh.build_mesh(parallel, meta, seed=0, timeout=timedelta(minutes=30))


def _full_size(mesh: Mesh, architecture: Architecture, parallel: ParallelConfig) -> list[dict[str, Any]]:
    """What the first and last rank of every pipeline stage hold, and the global tensors they would load."""
    from minpro_megatron.actor.model import build_model

    found = []
    per_stage = parallel.world_size // parallel.pipeline
    for stage in range(parallel.pipeline):
        for rank in (stage * per_stage, (stage + 1) * per_stage - 1):
            with rank_of(parallel, rank) as own, torch.device("meta"):
                chunks = build_model(architecture, own, torch.bfloat16)
                parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
                states = [chunk.sharded_state_dict(metadata={"dp_cp_group": own.groups.dp_cp}) for chunk in chunks]
                found.append(
                    {
                        "stage": own.pipeline.rank(),
                        "parameters": sum(parameter.numel() for parameter in parameters),
                        "weight_bytes": sum(parameter.nbytes for parameter in parameters),
                        "tensors": {key: shape for state in states for key, shape in _global_shapes(state)},
                    }
                )
    return found


def _global_shapes(state: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    apply_factories(state)
    for item in nested_values(state):
        if isinstance(item, ShardedTensor):
            yield item.key, tuple(item.global_shape)
        elif isinstance(item, ShardedObject):
            yield item.unique_key, ()


@pytest.mark.parametrize(("model", "degrees"), MESHES, ids=str)
def test_a_plan_is_what_megatron_builds_at_full_size(model: str, degrees: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[model]))
    architecture, parallel = read_architecture(tmp_path), ParallelConfig(**degrees)
    (found,) = run_mesh(_full_size, architecture, parallel)
    planned = {stage: kind for kind in rank_kinds(architecture, parallel) for stage in kind.stages}
    assert sorted(rank["stage"] for rank in found) == sorted([*planned, *planned])
    for rank in found:
        kind = planned[rank["stage"]]
        assert (rank["parameters"], rank["weight_bytes"]) == (kind.parameters, kind.weight_bytes)
    # together the ranks load every global tensor that a conversion writes, and no other
    loaded = {key: shape for rank in found for key, shape in rank["tensors"].items() if "_extra_state" not in key}
    places = [(place(entry, architecture), entry.full_shape) for entry in entries(architecture)]
    assert loaded == {where.key: (*where.sizes, *shape) for where, shape in places}
    states = {key for rank in found for key in rank["tensors"] if "_extra_state" in key}
    assert states <= {where.state_object for where, _ in places}


@pytest.mark.parametrize("model", ["30B-A3B"])
def test_every_tensor_of_the_released_mixture_is_covered_once(model: str, tmp_path: Path) -> None:
    """Its tensors as transformers names and shapes them."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[model]))
    plan = make_plan(tmp_path, ParallelConfig(tensor=4, pipeline=2, expert=8, context=2))
    assert (plan.hf_tensors_covered, plan.hf_tensors_missed, plan.hf_tensors_absent) == (18_867, [], [])
    assert plan.parameters == 30_532_122_624


def _optimizer_states(mesh: Mesh, hf_path: Path) -> tuple[int, int, int]:
    """This rank's stage, parameters and main weights in the optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from minpro_megatron.actor.model import build_model

    (chunk,) = build_model(read_architecture(hf_path), mesh, torch.bfloat16)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model: Any = DistributedDataParallel(chunk.config, config, chunk)
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(lr=1e-3, bf16=True, use_distributed_optimizer=True), [model]
    )
    main = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(parameter.dtype == torch.float32 for parameter in main)
    parameters = sum(parameter.numel() for parameter in chunk.parameters())
    return mesh.pipeline.rank(), parameters, sum(parameter.numel() for parameter in main)


@pytest.mark.parametrize(
    "degrees",
    long_after(
        1, [{"tensor": 2, "context": 2, "expert": 2}, {"expert": 2, "data": 4}, {"pipeline": 2, "expert": 2, "data": 2}]
    ),
    ids=str,
)
def test_optimizer_states_are_cut_as_planned(degrees: dict[str, Any], tmp_path: Path) -> None:
    make_model("moe").save_pretrained(tmp_path)
    ranks = run_mesh(_optimizer_states, tmp_path, **degrees)
    kinds = rank_kinds(read_architecture(tmp_path), ParallelConfig(**degrees))
    for stages, planned in ((kind.stages, kind) for kind in kinds):
        own = [rank for rank in ranks if rank[0] in stages]
        assert {parameters for _, parameters, _ in own} == {planned.parameters}
        # ranks differ by where the cuts fall; together they hold every state once
        assert sum(states for _, _, states in own) == _states(planned) * len(own)


def _states(kind: RankKind) -> int:
    return kind.optimizer_bytes // 12
