"""A batch of several policy versions: every token is scored under the weights that sampled it, on any mesh, in the rows
that the update will have."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_model, make_sequences
from tests.mesh.steps import loaded_model, step_config
from tests.support.long_cases import long_after

pytestmark = pytest.mark.mesh


def _scores(mesh: Mesh, hf_path: str, versions: list[np.ndarray], axes: dict[str, int]) -> tuple[np.ndarray, ...]:
    """(scored by version, expected): the second from whole passes under each version's weights."""
    import torch

    from minpro_megatron.actor.behavior import score_by_version
    from minpro_megatron.actor.policy import Policy

    config = step_config(axes, row_tokens=48)
    architecture, chunks = loaded_model(mesh, hf_path)
    policy = Policy(config, architecture, chunks, mesh)
    sequences = make_sequences(len(versions), 12)
    whole = []
    for version in range(3):
        policy.take_snapshot(f"kept {version}")
        whole.append(policy.score(sequences))
        if version < 2:
            with torch.no_grad():
                for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                    parameter.mul_(1.05)

    def weights_of(version: int) -> AbstractContextManager[None]:
        return nullcontext() if version == 2 else policy.use_snapshot(f"kept {version}")

    sampled_with = [of_sequence[: len(s.response_ids)] for of_sequence, s in zip(versions, sequences, strict=True)]
    mini_batches = [sequences[:3], sequences[3:]]
    found = score_by_version(policy, mini_batches, [sampled_with[:3], sampled_with[3:]], weights_of)
    expected = np.choose(np.concatenate(sampled_with), whole)
    # as after a restart: some groups carry their scores already
    rest = score_by_version(policy, mini_batches, [[None, sampled_with[1], None], [None, None]], weights_of)
    own = slice(sequences[1].first_slot, sequences[2].first_slot)
    np.testing.assert_array_equal(rest, found[own])
    assert score_by_version(policy, mini_batches, [[None] * 3, [None] * 2], weights_of).shape == (0,)
    return found, expected, np.abs(whole[0] - whole[2])


@pytest.mark.parametrize(
    "axes", long_after(1, [{"tensor": 2, "expert": 2}, {"context": 2}, {"pipeline": 2}, {"tensor": 1}])
)
def test_each_token_is_scored_under_its_own_version(tmp_path: Path, axes: dict[str, int]) -> None:
    make_model("moe").save_pretrained(tmp_path)
    versions = [
        np.zeros(64, np.int32),
        np.repeat([0, 1], [3, 61]).astype(np.int32),
        np.repeat([0, 1, 2], [2, 3, 59]).astype(np.int32),
        np.full(64, 2, np.int32),
        np.repeat([1, 2], [1, 63]).astype(np.int32),
    ]
    for found, expected, changes in run_mesh(_scores, str(tmp_path), versions, axes, **axes):
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert changes.mean() > 1e-2  # the weights do differ


def _rows_run(mesh: Mesh, hf_path: str) -> list[int]:
    """How many micro-batches a pass runs: over the whole mini-batch, and where one sequence is asked for."""
    from minpro_megatron.actor.policy import Policy

    config = step_config({}, row_tokens=48)
    architecture, chunks = loaded_model(mesh, hf_path)
    policy, sequences, runs = Policy(config, architecture, chunks, mesh), make_sequences(9, 30), [0]
    chunks[0].register_forward_hook(lambda *_: runs.append(runs.pop() + 1))
    whole = policy.score(sequences)
    runs.append(0)
    one = policy.score(sequences, wanted=[index == 2 for index in range(9)])
    own = slice(sequences[2].first_slot, sequences[3].first_slot)
    np.testing.assert_array_equal(one[own], whole[own])
    return runs


def test_rows_that_nobody_asks_for_are_not_run(tmp_path: Path) -> None:
    make_model("moe").save_pretrained(tmp_path)
    ((whole, one),) = run_mesh(_rows_run, str(tmp_path))
    assert one == 1
    assert whole > 2
