"""The Transformer Engine backend, around a stand-in for the package: same steps, same names, same checkpoints.

What is real here: this package, megatron-core and its wrappers of Transformer Engine. What is not: Transformer Engine,
whose modules transformer_engine_stand_in.py has in plain torch. It has not run on a GPU.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minpro_megatron.checkpoints.sharded_files import read_metadata
from minpro_megatron.config.run import RunConfig
from minpro_megatron.conversion.convert import to_megatron
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.table import entries
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.passed_weights import no_display
from tests.mesh.ragged_batch import in_order
from tests.mesh.reference import make_sequences, minpro_loss, reference_step, saved_tensors
from tests.mesh.stand_in_process import run_with_stand_in
from tests.mesh.steps import LEARNING_RATE, TEMPERATURE, differences, loaded_policy, step_config, take_steps

pytestmark = [pytest.mark.mesh, pytest.mark.long]  # a process of its own that takes a minute to import

BACKENDS = ("transformer_engine", "torch")
STEPS: list[tuple[str, dict[str, int]]] = [
    ("moe", {"tensor": 2, "expert": 2}),
    ("moe", {"pipeline": 2, "virtual_pipeline": 2, "context": 2, "expert": 2}),
    ("moe", {"tensor": 2, "expert_tensor": 2, "data": 2, "expert": 2}),
    ("dense", {"tensor": 2, "context": 2}),
    ("tied", {"pipeline": 2}),
    ("qwen2", {"tensor": 2, "context": 2}),
    ("llama", {"tensor": 2}),
    ("yarn", {"context": 2}),
    ("glm", {"pipeline": 2, "tensor": 2, "expert": 2}),
]
SAVED_ON: dict[str, int] = {"tensor": 2, "expert": 2}
CROSSINGS = [  # who saved, who loads; torch's own: test_training_state.py
    ("transformer_engine", "torch"),
    ("torch", "transformer_engine"),
    ("transformer_engine", "transformer_engine"),
]
LOADED_ON: dict[str, int] = {"pipeline": 2, "data": 2, "expert": 2}


# ---- In the process with the stand-in ----


def with_stand_in(cases: list[tuple[str, RunConfig, list]], hf_path: str, folder: str) -> dict[str, Any]:
    """Everything in one process: it takes seconds to start."""
    sequences = make_sequences(8, 30)
    config = step_config({"tensor": 2, "expert": 2}, row_tokens=128)
    saved = run_mesh(_save, step_config(SAVED_ON, row_tokens=128), hf_path, folder, sequences, **SAVED_ON)
    loaded = run_mesh(_load, step_config(LOADED_ON, row_tokens=128), hf_path, folder, sequences, **LOADED_ON)
    return {
        "steps": [
            run_mesh(take_steps, path, [(config, batch)], BACKENDS[0], **config.parallel.model_dump())[0][0]
            for path, config, batch in cases
        ],
        "recomputed": run_mesh(_recomputed, hf_path, config, sequences, **config.parallel.model_dump()),
        "fused": run_mesh(_fused, hf_path, config, sequences, **config.parallel.model_dump()),
        "saved": saved,
        "loaded": loaded,
        "chosen": _chosen(),
    }


def _chosen() -> dict[str, Any]:
    """What is chosen and switched on, with the stand-in's few functions and with those that kernels come with."""
    from megatron.core.extensions import transformer_engine as extension

    from minpro_megatron.actor.backends.select import select_backend

    def chosen(name: str, device: str, dtype: torch.dtype) -> str:
        return type(select_backend(name, torch.device(device), dtype)).__name__

    def settings(device: str) -> dict[str, Any]:
        return select_backend("transformer_engine", torch.device(device), torch.bfloat16).settings(mixture=True)

    found = {
        "cuda bfloat16": chosen("auto", "cuda", torch.bfloat16),
        "cuda float32": chosen("auto", "cuda", torch.float32),
        "cpu": chosen("auto", "cpu", torch.bfloat16),
        "torch": chosen("torch", "cuda", torch.bfloat16),
        "without kernels": settings("cuda"),
    }
    kernels: Any = extension
    kernels.fused_apply_rotary_pos_emb_thd = kernels.fused_permute_with_probs = print
    return found | {"with kernels": settings("cuda"), "on a CPU": settings("cpu")}


def _recomputed(mesh: Mesh, hf_path: str, config: RunConfig, sequences: list) -> dict[str, list[float]]:
    """Gradient norms of two updates, for each way to recompute."""
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture, norms = read_architecture(hf_path), {}
    ways = {
        "none": ModelFeatures("none", backend=BACKENDS[0]),
        # the activation of the experts, and the norm before them
        "selective": ModelFeatures("selective", backend=BACKENDS[0]),
        "attention": ModelFeatures("selective", recompute_modules=("core_attn",), backend=BACKENDS[0]),
        "full": ModelFeatures("full", backend=BACKENDS[0]),
        "one layer": ModelFeatures("full", recompute_layers=1, backend=BACKENDS[0]),
    }
    for recompute, features in ways.items():
        chunks = build_model(architecture, mesh, torch.float32, features)
        load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
        policy = Policy(config, architecture, chunks, mesh)
        norms[recompute] = [policy.update(sequences, LEARNING_RATE).grad_norm for _ in range(2)]
    return norms


def _fused(mesh: Mesh, hf_path: str, config: RunConfig, sequences: list) -> dict[bool, dict[str, np.ndarray]]:
    """The gradient of the second update, with and without sums in Transformer Engine's products; without NVIDIA Apex.
    The stand-in's gradients for autograd are not a number then: nothing may read them."""
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture, found = read_architecture(hf_path), {}
    for fuses in (True, False):
        fields = {"gradient_accumulation_fusion": fuses}
        chunks = build_model(
            architecture, mesh, torch.float32, ModelFeatures("full", backend=BACKENDS[0], megatron=fields)
        )
        assert {one.fuse_wgrad_accumulation for one in chunks[0].modules() if hasattr(one, "weight0")} == {fuses}
        load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
        policy = Policy(config, architecture, chunks, mesh)
        policy.update(sequences, LEARNING_RATE)
        policy.accumulate_gradient(sequences)
        gradients: Any = [(name, parameter) for name, parameter in chunks[0].named_parameters()]
        found[fuses] = {name: parameter.main_grad.numpy().copy() for name, parameter in gradients}
    return found


def _save(mesh: Mesh, config: RunConfig, hf_path: str, folder: str, sequences: list) -> dict[str, Any]:
    from minpro_megatron.checkpoints.converted_model import save_weights
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


def _load(mesh: Mesh, config: RunConfig, hf_path: str, folder: str, sequences: list) -> dict[tuple[str, str], Any]:
    """{(who saved, who loads): how training goes on}, and under ("converted", ...) the weights as converted."""
    from minpro_megatron.checkpoints.converted_model import load_weights

    found = {}
    for loader in BACKENDS:
        for saver in (saver for saver, other in CROSSINGS if other == loader):
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
        load_weights(policy.modules, architecture, Path(folder, "converted"), mesh)
        found["converted", loader] = _weights(mesh, architecture, policy)
    return found


def _continued(mesh: Mesh, architecture: Any, policy: Any, sequences: list) -> dict[str, Any]:
    from minpro_megatron.metrics.metric import merge

    before = _weights(mesh, architecture, policy)
    results = [policy.update(sequences, LEARNING_RATE) for _ in range(2)]
    losses = [merge(mesh.from_all_ranks(result.metrics))["objective/loss"].value for result in results]
    return {"before": before, "losses": losses, "norms": [result.grad_norm for result in results]}


def _weights(mesh: Mesh, architecture: Any, policy: Any) -> dict[str, np.ndarray]:
    from minpro_megatron.publishing.gather import WeightGatherer

    buckets = WeightGatherer(policy.modules, architecture, mesh).buckets(bucket_bytes=1 << 20)
    return {name: tensor.numpy().copy() for bucket in buckets for name, tensor in bucket}


# ---- In the process of the tests ----


class Found(NamedTuple):
    start: Start
    folder: Path
    by_name: dict[str, Any]


@pytest.fixture(scope="module")
def found(starts: dict[str, Start], tmp_path_factory: pytest.TempPathFactory) -> Found:
    start, folder = starts["moe"], tmp_path_factory.mktemp("checkpoints")
    to_megatron(Path(start.hf_path), folder / "converted", no_display)
    for backend in BACKENDS:
        (folder / backend).mkdir()
    cases = [  # several sequences in a row, so that some of them are padding
        (starts[kind].hf_path, step_config(parallel, row_tokens=1024), in_order(starts[kind].groups))
        for kind, parallel in STEPS
    ]
    return Found(start, folder, run_with_stand_in(f"{__name__}:with_stand_in", cases, start.hf_path, str(folder)))


@pytest.mark.parametrize("place", range(len(STEPS)), ids=[str(case) for case in STEPS])
def test_a_step_equals_transformers(place: int, found: Found, starts: dict[str, Start]) -> None:
    start = starts[STEPS[place][0]]
    optimizer = step_config({}).optimizer
    expected = reference_step(
        start.model, in_order(start.groups), minpro_loss("token_mean"), TEMPERATURE, LEARNING_RATE, optimizer
    )
    assert differences(found.by_name["steps"][place], expected).breaches == []


def test_recomputing_changes_no_gradient(found: Found) -> None:
    for norms in found.by_name["recomputed"]:
        # Megatron runs a nested backward pass for parts whose output it discards, which rounds some sums differently.
        assert norms.pop("selective") == pytest.approx(norms["none"], rel=1e-6)
        assert norms == dict.fromkeys(norms, norms["none"])


def test_sums_in_products_give_the_same_gradient(found: Found) -> None:
    for rank in found.by_name["fused"]:
        for name, expected in rank[False].items():
            largest = np.abs(expected).max()
            assert largest > 0 or ".experts." in name, name  # an expert may have no token
            np.testing.assert_allclose(rank[True][name], expected, rtol=0, atol=1e-5 * largest, err_msg=name)
        assert sum(np.abs(one).max() > 0 for name, one in rank[True].items() if ".experts." in name) >= 4


def test_what_is_chosen_and_switched_on(found: Found) -> None:
    chosen = found.by_name["chosen"]
    assert chosen["cuda bfloat16"] == "TransformerEngineLayers"
    assert chosen["cuda float32"] == chosen["cpu"] == chosen["torch"] == "TorchLayers"
    compiled = {"bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion"}
    kernels = {"apply_rope_fusion", "moe_permute_fusion"}
    for case, expected in (("without kernels", compiled), ("with kernels", compiled | kernels), ("on a CPU", set())):
        on = {name for name, value in chosen[case].items() if value is True}
        assert on == expected | {"moe_grouped_gemm"}, case


def test_parameters_have_the_names_of_the_table(found: Found) -> None:
    of_transformer_engine, of_torch = ([rank[backend] for rank in found.by_name["saved"]] for backend in BACKENDS)
    layer = "decoder.layers.1."
    for rank, names in enumerate(of_transformer_engine):
        assert {layer + "self_attention.linear_qkv.layer_norm_weight", layer + "pre_mlp_layernorm.weight"} <= set(
            names["live"]
        )
        assert layer + "mlp.experts.linear_fc1.weight3" in names["live"]
        assert layer + "input_layernorm.weight" not in names["live"]
        assert sorted(names["table"]) == sorted(of_torch[rank]["table"])
    everywhere = {name for names in of_transformer_engine for name in names["table"]}
    assert everywhere == {entry.megatron for entry in entries(read_architecture(found.start.hf_path))}


def test_a_checkpoint_of_either_backend_is_what_the_conversion_writes(found: Found) -> None:
    def described(folder: Path) -> dict[str, Any]:
        stored = read_metadata(folder).state_dict_metadata
        return {
            key: (item.size, item.properties) if isinstance(item, TensorStorageMetadata) else "object"
            for key, item in stored.items()
        }

    expected = described(found.folder / "converted")
    for backend in BACKENDS:
        assert described(found.folder / backend / "weights") == expected


def test_converted_weights_load_bit_for_bit(found: Found) -> None:
    expected = {name: tensor.numpy() for name, tensor in saved_tensors(found.start.model).items()}
    for backend in BACKENDS:
        loaded = found.by_name["loaded"][0]["converted", backend]
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(loaded[name], tensor, err_msg=name)


@pytest.mark.parametrize(("saver", "loader"), CROSSINGS)
def test_what_one_backend_saved_another_continues_on_another_mesh(saver: str, loader: str, found: Found) -> None:
    expected, resumed = found.by_name["saved"][0][saver], found.by_name["loaded"][0][saver, loader]
    for loaded in (resumed["loaded"], resumed["before"]):
        assert loaded.keys() == expected["before"].keys()
        for name, tensor in expected["before"].items():
            np.testing.assert_array_equal(loaded[name], tensor, err_msg=name)
    # the second loss and norm depend on the moments and the step count, which were loaded too
    assert resumed["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert resumed["norms"] == pytest.approx(expected["norms"], rel=1e-5)
