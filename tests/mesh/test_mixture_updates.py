"""What an update of a mixture of experts leaves in memory and sends: nothing that the next one does not need."""

import functools
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.live_bytes import LiveBytes
from tests.mesh.reference import make_sequences
from tests.mesh.steps import step_config

pytestmark = pytest.mark.mesh

MESH = {"data": 4, "expert": 2}  # dense parameters are sharded over 4 ranks, those of experts over 2
UPDATES = 2


class Found(NamedTuple):
    """What one rank found."""

    grad_norms: list[float]
    left: int  # bytes of tensors that were made in an update's forward and backward and live on
    gathers: list[int]  # of each parameter bucket, in all updates
    weights: dict[str, np.ndarray]  # of the whole model, on rank 0


def _train(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list[TokenSequence], like_megatron: bool) -> Found:
    """`like_megatron`: without what the policy changes in Megatron's behaviour."""
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors
    from tests.mesh.gradients import whole_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, torch.float32, ModelFeatures(recompute="full"))
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    policy = Policy(config, architecture, chunks, mesh)
    if like_megatron:
        for module in (module for chunk in chunks for module in chunk.modules()):
            module._forward_hooks.clear()
        for part in policy._optimizer.chained_optimizers:
            part._defer_param_sync = False
    gathers = _counted_gathers(policy)
    norms = [policy.update(sequences, 1e-3).grad_norm for _ in range(UPDATES)]
    with LiveBytes() as live:
        policy.accumulate_gradient(sequences)
        live._count()
    return Found(norms, live.now, sorted(gathers.values()), whole_tensors(policy, architecture, mesh))


def _train_both(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list[TokenSequence]) -> tuple[Found, Found]:
    """From the policy as it is, and from one that leaves Megatron's behaviour as it is."""
    ours, megatrons = (_train(mesh, config, hf_path, sequences, like_megatron) for like_megatron in (False, True))
    return ours, megatrons


def _counted_gathers(policy: Any) -> Counter[int]:
    """Counts from now on how often each bucket's parameters are gathered."""
    gathers: Counter[int] = Counter()
    for chunk in policy._chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            gathers[id(group)] = 0
            real = group.start_param_sync

            def counted(*args: Any, real: Any = real, key: int = id(group), **kwargs: Any) -> Any:
                gathers[key] += 1
                return real(*args, **kwargs)

            group.start_param_sync = functools.wraps(real)(counted)
    return gathers


@pytest.fixture(scope="module")
def found(starts: dict[str, Start]) -> dict[str, list[Found]]:
    """Of each rank, in both cases."""
    config, sequences = step_config(MESH, row_tokens=128), make_sequences(8, 30)
    ranks = run_mesh(_train_both, config, starts["moe"].hf_path, sequences, **MESH)
    return {"ours": [ours for ours, _ in ranks], "megatron's": [megatrons for _, megatrons in ranks]}


def test_no_layer_keeps_tensors_after_an_update(found: dict[str, list[Found]]) -> None:
    hidden_state = 16 * 32 * 4  # at least 16 tokens per row, of 32 float32 values
    for rank in found["ours"]:
        assert rank.left < hidden_state
    assert all(rank.left > 4 * 2 * hidden_state for rank in found["megatron's"]), "without the hook, two per layer stay"


def test_every_bucket_is_gathered_once_per_update(found: dict[str, list[Found]]) -> None:
    for rank in found["ours"]:
        assert rank.gathers == [UPDATES, UPDATES]  # one bucket of dense parameters, one of experts
    for rank in found["megatron's"]:
        assert rank.gathers == [2 * UPDATES, 2 * UPDATES]


def test_gradient_norms_and_weights_are_megatrons_to_the_last_bit(found: dict[str, list[Found]]) -> None:
    ours, theirs = found["ours"], found["megatron's"]
    assert [rank.grad_norms for rank in ours] == [rank.grad_norms for rank in theirs]
    assert ours[0].weights.keys() == theirs[0].weights.keys()
    for name, weight in ours[0].weights.items():
        np.testing.assert_array_equal(theirs[0].weights[name], weight, err_msg=name)
