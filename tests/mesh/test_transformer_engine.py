"""The Transformer Engine backend, around a stand-in for the package: same steps, same names, same checkpoints.

What is real here: this package, megatron-core and its wrappers of Transformer Engine. What is not: Transformer Engine,
whose modules transformer_engine_stand_in.py has in plain torch. It has not run on a GPU.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.architecture import read_architecture
from minpro_megatron.weights.convert import to_megatron
from minpro_megatron.weights.sharded_files import read_metadata
from minpro_megatron.weights.table import entries
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.ragged_batch import in_order
from tests.mesh.reference import make_sequences, minpro_loss, reference_step, saved_tensors
from tests.mesh.stand_in_process import run_with_stand_in
from tests.mesh.steps import LEARNING_RATE, TEMPERATURE, differences, loaded_policy, step_config, take_steps
from tests.mesh.test_weights import no_display

pytestmark = pytest.mark.mesh

BACKENDS = ("transformer_engine", "torch")
STEPS: list[tuple[str, dict[str, int]]] = [
    ("moe", {"tensor": 2, "expert": 2}),
    ("moe", {"pipeline": 2, "virtual_pipeline": 2, "context": 2, "expert": 2}),
    ("moe", {"tensor": 2, "expert_tensor": 2, "data": 2, "expert": 2}),
    ("dense", {"tensor": 2, "context": 2}),
    ("tied", {"pipeline": 2}),
]
SAVED_ON: dict[str, int] = {"tensor": 2, "expert": 2}
LOADED_ON: dict[str, int] = {"pipeline": 2, "data": 2, "expert": 2}


# ---- In the process with the stand-in ----


def steps_with_stand_in(cases: list[tuple[str, RunConfig, list]]) -> list[Any]:
    return [
        run_mesh(take_steps, hf_path, [(config, sequences)], BACKENDS[0], **config.parallel.model_dump())[0][0]
        for hf_path, config, sequences in cases
    ]


def checkpoints_with_stand_in(hf_path: str, converted: str, folder: str, sequences: list) -> dict[str, Any]:
    saved = run_mesh(_save, step_config(SAVED_ON, row_tokens=128), hf_path, folder, sequences, **SAVED_ON)
    loaded = run_mesh(_load, step_config(LOADED_ON, row_tokens=128), hf_path, converted, folder, sequences, **LOADED_ON)
    return {"saved": saved, "loaded": loaded}


def _save(mesh: Mesh, config: RunConfig, hf_path: str, folder: str, sequences: list) -> dict[str, Any]:
    from minpro_megatron.actor.checkpoint import save_weights
    from minpro_megatron.weights.local import global_parameters

    found = {}
    for backend in BACKENDS:
        architecture, policy = loaded_policy(mesh, config, hf_path, backend)
        names = {
            "live": [name for name, _ in policy.modules[0].named_parameters()],
            "table": list(global_parameters(policy.modules, architecture.num_experts, mesh)),
            "state": sorted(policy.modules[0].state_dict()),
        }
        for _ in range(2):
            policy.update(sequences, LEARNING_RATE)
        save_weights(policy.modules, architecture, Path(folder, backend, "weights"), mesh, hf_path)
        Path(folder, backend, "state").mkdir(exist_ok=True)
        torch.distributed.barrier()
        policy.save(Path(folder, backend, "state")).complete()
        found[backend] = names | _continued(mesh, architecture, policy, sequences)
    return found


def _load(
    mesh: Mesh, config: RunConfig, hf_path: str, converted: str, folder: str, sequences: list
) -> dict[tuple[str, str], Any]:
    """{(who saved, who loads): how training goes on}, and under ("converted", ...) the weights as converted."""
    from minpro_megatron.actor.checkpoint import load_weights

    found = {}
    for loader in BACKENDS:
        for saver in BACKENDS:
            architecture, policy = loaded_policy(mesh, config, hf_path, loader)
            policy.update(sequences[:3], 0.05)  # weights, moments and step are all other than those saved
            load_weights(policy.modules, architecture, Path(folder, saver, "weights"), mesh)
            weights = _weights(mesh, architecture, policy)
            policy.update(sequences[:3], 0.05)
            policy.load(Path(folder, saver, "state"))
            found[saver, loader] = {"loaded": weights} | _continued(mesh, architecture, policy, sequences)
        architecture, policy = loaded_policy(mesh, config, hf_path, loader)
        for parameter in (parameter for chunk in policy.modules for parameter in chunk.parameters()):
            parameter.data.fill_(torch.nan)
        load_weights(policy.modules, architecture, converted, mesh)
        found["converted", loader] = _weights(mesh, architecture, policy)
    return found


def _continued(mesh: Mesh, architecture: Any, policy: Any, sequences: list) -> dict[str, Any]:
    from minpro_megatron.monitor.metrics import merge

    before = _weights(mesh, architecture, policy)
    results = [policy.update(sequences, LEARNING_RATE) for _ in range(2)]
    losses = [merge(mesh.from_all_ranks(result.metrics))["objective/loss"].value for result in results]
    return {"before": before, "losses": losses, "norms": [result.grad_norm for result in results]}


def _weights(mesh: Mesh, architecture: Any, policy: Any) -> dict[str, np.ndarray]:
    from minpro_megatron.weights.gather import WeightGatherer

    buckets = WeightGatherer(policy.modules, architecture, mesh).buckets(bucket_bytes=1 << 20)
    return {name: tensor.numpy().copy() for bucket in buckets for name, tensor in bucket}


# ---- In the process of the tests ----


@pytest.fixture(scope="module")
def steps(starts: dict[str, Start]) -> list[Any]:
    cases = [(starts[kind].hf_path, step_config(parallel), in_order(starts[kind].groups)) for kind, parallel in STEPS]
    return run_with_stand_in(f"{__name__}:steps_with_stand_in", cases)


@pytest.mark.parametrize("place", range(len(STEPS)), ids=[str(case) for case in STEPS])
def test_a_step_equals_transformers(place: int, steps: list[Any], starts: dict[str, Start]) -> None:
    start = starts[STEPS[place][0]]
    optimizer = step_config({}).optimizer
    expected = reference_step(
        start.model, in_order(start.groups), minpro_loss("token_mean"), TEMPERATURE, LEARNING_RATE, optimizer
    )
    assert differences(steps[place], expected).breaches == []


class Checkpoints:
    def __init__(self, start: Start, folder: Path) -> None:
        self.start, self.folder = start, folder
        to_megatron(Path(start.hf_path), folder / "converted", no_display)
        for backend in BACKENDS:
            (folder / backend).mkdir()
        found = run_with_stand_in(
            f"{__name__}:checkpoints_with_stand_in",
            start.hf_path,
            str(folder / "converted"),
            str(folder),
            make_sequences(8, 30),
        )
        self.saved, self.loaded = found["saved"], found["loaded"]


@pytest.fixture(scope="module")
def checkpoints(starts: dict[str, Start], tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(starts["moe"], tmp_path_factory.mktemp("checkpoints"))


def test_parameters_have_the_names_of_the_table(checkpoints: Checkpoints) -> None:
    of_transformer_engine, of_torch = ([rank[backend] for rank in checkpoints.saved] for backend in BACKENDS)
    layer = "decoder.layers.1."
    for rank, names in enumerate(of_transformer_engine):
        assert {layer + "self_attention.linear_qkv.layer_norm_weight", layer + "pre_mlp_layernorm.weight"} <= set(
            names["live"]
        )
        assert layer + "mlp.experts.linear_fc1.weight3" in names["live"]
        assert layer + "input_layernorm.weight" not in names["live"]
        assert sorted(names["table"]) == sorted(of_torch[rank]["table"])
    everywhere = {name for names in of_transformer_engine for name in names["table"]}
    assert everywhere == {entry.megatron for entry in entries(read_architecture(checkpoints.start.hf_path))}


def test_a_checkpoint_of_either_backend_is_what_the_conversion_writes(checkpoints: Checkpoints) -> None:
    def described(folder: Path) -> dict[str, Any]:
        stored = read_metadata(folder).state_dict_metadata
        return {
            key: (item.size, item.properties) if isinstance(item, TensorStorageMetadata) else "object"
            for key, item in stored.items()
        }

    expected = described(checkpoints.folder / "converted")
    for backend in BACKENDS:
        assert described(checkpoints.folder / backend / "weights") == expected


def test_converted_weights_load_bit_for_bit(checkpoints: Checkpoints) -> None:
    expected = {name: tensor.numpy() for name, tensor in saved_tensors(checkpoints.start.model).items()}
    for backend in BACKENDS:
        found = checkpoints.loaded[0]["converted", backend]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("loader", BACKENDS)
@pytest.mark.parametrize("saver", BACKENDS)
def test_what_one_backend_saved_another_continues_on_another_mesh(
    saver: str, loader: str, checkpoints: Checkpoints
) -> None:
    expected, found = checkpoints.saved[0][saver], checkpoints.loaded[0][saver, loader]
    for loaded in (found["loaded"], found["before"]):
        assert loaded.keys() == expected["before"].keys()
        for name, tensor in expected["before"].items():
            np.testing.assert_array_equal(loaded[name], tensor, err_msg=name)
    # the second loss and norm depend on the moments and the step count, which were loaded too
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
