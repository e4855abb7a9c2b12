"""Scoring, weights kept for it, and updates that must not happen."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.ragged_batch import in_order, shuffled
from tests.mesh.reference import response_log_probs
from tests.mesh.steps import LEARNING_RATE, TEMPERATURE, loaded_policy, step_config
from tests.support.long_cases import long_rows_after

pytestmark = pytest.mark.mesh

MESHES = [
    ("moe", {"tensor": 2, "context": 2, "expert": 2}, True),
    ("moe", {"pipeline": 2, "virtual_pipeline": 2, "data": 2}, True),
    ("tied", {"pipeline": 2, "tensor": 2}, False),
]


def _scores(mesh: Mesh, config: RunConfig, hf_path: str, sequences: Sequence[TokenSequence]) -> dict[str, np.ndarray]:
    _, policy = loaded_policy(mesh, config, hf_path)
    before = policy.score(sequences)
    policy.take_snapshot("sampling")
    policy.update(sequences, LEARNING_RATE)
    with policy.use_snapshot("sampling"):
        kept = policy.score(sequences)
    return {"before": before, "kept": kept, "after": policy.score(sequences)}


@pytest.mark.parametrize(("kind", "parallel", "packing"), long_rows_after(1, MESHES), ids=str)
def test_every_rank_has_the_log_probs_of_transformers(
    kind: str, parallel: dict[str, int], packing: bool, starts: dict[str, Start]
) -> None:
    """Before an update, and after it with the weights from before; in the order in which the sequences are given."""
    start = starts[kind]
    sequences = shuffled(start.groups, seed=3)
    with torch.no_grad():
        expected = torch.cat([response_log_probs(start.model, one, TEMPERATURE) for one in sequences]).numpy()
    ranks = run_mesh(_scores, step_config(parallel, packing=packing), start.hf_path, sequences, **parallel)
    for found in ranks:
        np.testing.assert_allclose(found["before"], expected, atol=2e-5)
        np.testing.assert_array_equal(found["kept"], found["before"])
        assert np.abs(found["after"] - found["before"]).max() > 1e-3


def _step_on_nan(
    mesh: Mesh, config: RunConfig, hf_path: str, sequences: list[TokenSequence]
) -> tuple[str | None, bool]:
    _, policy = loaded_policy(mesh, config, hf_path)
    before = [parameter.detach().clone() for chunk in policy.modules for parameter in chunk.parameters()]
    result = policy.update([replace(sequences[0], advantage=float("nan")), *sequences[1:]], LEARNING_RATE)
    after = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    return result.skipped, all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_update_with_nan_gradient_is_skipped_on_every_rank(starts: dict[str, Start]) -> None:
    parallel = {"tensor": 2, "expert": 2}
    ranks = run_mesh(
        _step_on_nan, step_config(parallel), starts["moe"].hf_path, in_order(starts["moe"].groups), **parallel
    )
    assert ranks == [("gradient not finite", True)] * 2


def _misuse_while_swapped(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list[TokenSequence]) -> None:
    _, policy = loaded_policy(mesh, config, hf_path)
    with pytest.raises(AssertionError, match="comes first"), policy.use_snapshot("sampling"):
        pass
    policy.take_snapshot("sampling")
    policy.update(sequences, LEARNING_RATE)
    trained = [parameter.detach().clone() for chunk in policy.modules for parameter in chunk.parameters()]
    with policy.use_snapshot("sampling"):
        for misuse in (lambda: policy.take_snapshot("other"), policy.use_snapshot("sampling").__enter__):
            with pytest.raises(AssertionError, match="swapped in"):
                misuse()
        with pytest.raises(AssertionError, match="swapped in"):
            policy.update(sequences, LEARNING_RATE)
    with pytest.raises(KeyError), policy.use_snapshot("sampling"):
        raise KeyError("scoring failed")
    after = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(trained, after, strict=True))
    policy.take_snapshot("sampling")  # allowed again


def test_nothing_but_scoring_is_allowed_with_the_sampling_weights_swapped_in(starts: dict[str, Start]) -> None:
    start = starts["dense"]
    run_mesh(_misuse_while_swapped, step_config({}), start.hf_path, in_order(start.groups))
