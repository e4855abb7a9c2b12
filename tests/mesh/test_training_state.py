"""A run saved on one mesh and resumed on another continues with the same losses, gradients and weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.checkpoints.sharded_files import ShardedReader, place, read_metadata
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.hf_files import HfReader
from minpro_megatron.weights.table import entries
from tests.mesh.continued_training import LEARNING_RATE, _policy, resume, resume_from_nothing, train_and_save
from tests.mesh.harness import run_mesh
from tests.mesh.planned_models import architecture
from tests.mesh.reference import make_model, make_sequences, saved_tensors
from tests.mesh.steps import step_config
from tests.support.long_cases import long_after, long_rows_after

pytestmark = pytest.mark.mesh

FROM = {"tensor": 2, "pipeline": 2, "expert": 2}
TO = [{"data": 2, "context": 2, "expert": 4}, {"pipeline": 2, "virtual_pipeline": 2, "data": 2}, {}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list, dict[str, Any]]:
    hf_path, folder = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("state")
    make_model("moe").save_pretrained(hf_path)
    random = np.random.default_rng(3)
    sequences = [  # about what the model says of random tokens: ratios around 1
        replace(one, behavior_log_probs=random.normal(-4.5, 0.7, len(one.response_ids)).astype(np.float32))
        for one in make_sequences(8, 30)
    ]
    ranks = run_mesh(train_and_save, step_config(FROM, row_tokens=128), str(hf_path), str(folder), sequences, **FROM)
    return hf_path, folder, sequences, ranks[0]


@pytest.mark.parametrize(
    ("start", "parallel"),
    long_rows_after(
        1,
        [
            ({"data": 2, "expert": 2}, {}),
            ({"tensor": 2, "pipeline": 2, "data": 2, "expert": 2}, {"expert": 2, "context": 2}),
        ],
    ),
    ids=str,
)
def test_what_is_not_trained_is_saved_and_loaded_too(
    start: dict[str, int], parallel: dict[str, int], tmp_path: Path
) -> None:
    """The biases with which GLM chooses experts, of which every rank has all."""
    hf_path, folder = tmp_path / "hf", tmp_path / "state"
    folder.mkdir()
    make_model("glm").save_pretrained(hf_path)
    sequences = make_sequences(8, 30)
    config = step_config(start, row_tokens=128)
    expected = run_mesh(train_and_save, config, str(hf_path), str(folder), sequences, **start)[0]
    config = step_config(parallel, row_tokens=128)
    found = run_mesh(resume_from_nothing, config, str(hf_path), str(folder), sequences, **parallel)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    biases = [name for name in expected["weights"] if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    original = {name: tensor.numpy() for name, tensor in saved_tensors(make_model("glm")).items()}
    for name in biases:
        np.testing.assert_array_equal(expected["weights"][name], original[name])
        np.testing.assert_array_equal(found["weights"][name], original[name])


def _save_before_updates(mesh: Mesh, config: RunConfig, hf_path: str, folder: str) -> None:
    _, policy = _policy(mesh, config, hf_path)
    policy.save(Path(folder)).complete()


def test_weights_that_three_ranks_wrote_are_read_whole_by_the_converter(saved: tuple, tmp_path: Path) -> None:
    hf_path, parallel = saved[0], {"data": 3}
    run_mesh(_save_before_updates, step_config(parallel), str(hf_path), str(tmp_path), **parallel)
    a, source, reader = read_architecture(hf_path), HfReader(hf_path), ShardedReader(tmp_path)
    for entry in entries(a):
        expected = entry.join([source.read(name) for name in entry.hf])
        found = reader.read_rows(place(entry, a), tuple(expected.shape), 0, len(expected))
        np.testing.assert_array_equal(found.numpy(), expected.float().numpy(), err_msg=entry.megatron)
    stored = read_metadata(tmp_path).storage_data
    files = {where.relative_path for at, where in stored.items() if not at.fqn.startswith(("optimizer.", "common"))}
    assert files == {f"__{rank}_0.distcp" for rank in range(3)}, "every rank writes its range of the weights"


def _memory(mesh: Mesh, folder: str) -> dict[str, float]:
    """{what was done: how much more memory its tensors took than the rank's own states do}, relative to these."""
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.checkpoints import state_pieces
    from tests.mesh.live_bytes import LiveBytes

    state_pieces.PIECE_BYTES = 1 << 17
    a = replace(architecture(mixture=True), vocab_size=1 << 14)  # so large that a save's plan is nothing beside it
    chunks = build_model(a, mesh, torch.float32)
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        torch.nn.init.constant_(parameter, 0.5)
    policy = Policy(step_config({"data": mesh.config.data_size}), a, chunks, mesh)
    first, background, at_once = folders = [Path(folder, name) for name in ("first", "background", "at-once")]
    if mesh.rank == 0:
        for path in folders:
            path.mkdir()
    torch.distributed.barrier()
    policy.save(first).complete()  # makes the moments
    parameters = [
        p for one in policy._optimizer.chained_optimizers for g in one.optimizer.param_groups for p in g["params"]
    ]
    states = 4 * 4 * sum(parameter.numel() for parameter in parameters)  # weights, float32 weights and two moments
    found = {}
    with LiveBytes() as live:
        write = policy.save(background, in_background=True)
    write.is_done(wait=True)
    write.complete()
    found["background"] = live.peak / states
    with LiveBytes() as live:
        policy.save(at_once).complete()
    found["at once"] = live.peak / states
    with LiveBytes() as live:
        policy.load(at_once)
    found["load"] = live.peak / states
    return found


@pytest.mark.parametrize("data", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_rank_needs_no_more_memory_than_one_copy_of_what_it_owns(data: int, tmp_path: Path) -> None:
    for found in run_mesh(_memory, str(tmp_path), data=data, expert=2):
        assert 1 <= found["background"] < 1.1
        assert found["at once"] < 0.1
        assert found["load"] < 0.1  # a stored part at a time


@pytest.mark.parametrize("parallel", long_after(1, TO), ids=str)
def test_resumed_on_another_mesh_the_run_goes_on_as_before(parallel: dict[str, int], saved: tuple) -> None:
    hf_path, folder, sequences, expected = saved
    config = step_config(parallel, row_tokens=128)
    found = run_mesh(resume, config, str(hf_path), str(folder), sequences, **parallel)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    start = {name: torch.from_numpy(value) for name, value in expected["weights"].items()}
    difference = sum(float((start[n] - torch.from_numpy(w)).norm() ** 2) for n, w in found["weights"].items()) ** 0.5
    assert difference < 1e-3 * LEARNING_RATE * sum(value.numel() for value in start.values()) ** 0.5


def test_resumed_on_the_same_mesh_it_is_the_same_to_the_bit(saved: tuple) -> None:
    hf_path, folder, sequences, expected = saved
    found = run_mesh(resume, step_config(FROM, row_tokens=128), str(hf_path), str(folder), sequences, **FROM)[0]
    assert found["losses"] == expected["losses"]
    assert found["norms"] == expected["norms"]
    for name, value in expected["weights"].items():
        np.testing.assert_array_equal(found["weights"][name], value, err_msg=name)
