"""The optimizer in host memory: the same updates, and checkpoints that either kind of optimizer continues.

megatron moves what is on a GPU. There is none here, so in these ranks tensors pass for the GPU's until megatron copies
them to the host; what it then does with them, and all of the optimizer's arithmetic, is real. Streams, pinned memory
and Transformer Engine's optimizer for what stays on the GPU are not tried.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_sequences
from tests.mesh.steps import step_config
from tests.support.offload_without_gpu import offload_works_here

pytestmark = pytest.mark.mesh

LEARNING_RATE = 1e-3
FRACTIONS = (0.0, 0.5, 1.0)
RESUMED = [  # with what fraction it was saved, and is loaded, and whether the loading policy has made other updates
    (0.0, 1.0, False),
    (1.0, 0.0, True),
    (0.5, 1.0, True),
    (0.5, 0.5, False),
]


def _policy(mesh: Mesh, config: RunConfig, hf_path: str, fraction: float) -> tuple[Any, Any]:
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, torch.bfloat16)
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    # a copy is not validated: that there is no GPU is what RunConfig refuses
    optimizer = config.optimizer.model_copy(update={"cpu_offload": fraction})
    return architecture, Policy(config.model_copy(update={"optimizer": optimizer}), architecture, chunks, mesh)


def _train_save_load(
    mesh: Mesh, config: RunConfig, hf_path: str, folder: str, sequences: list[TokenSequence]
) -> dict[str, Any]:
    offload_works_here()
    policies = {fraction: _policy(mesh, config, hf_path, fraction) for fraction in FRACTIONS}
    found: dict[str, Any] = {
        "on_host": {fraction: _fraction_on_host(policy) for fraction, (_, policy) in policies.items()},
        "gradients": {},
        "trained": {},
        "continued": {},
        "resumed": {},
    }
    for fraction, (architecture, policy) in policies.items():
        norms = [policy.update(sequences, LEARNING_RATE).grad_norm for _ in range(2)]
        found["gradients"][fraction] = [_gradients_on_host(hybrid) for hybrid in _hybrids(policy)]
        found["trained"][fraction] = (norms, _weights(mesh, architecture, policy))
        if mesh.rank == 0:
            Path(folder, str(fraction)).mkdir()
        torch.distributed.barrier()
        policy.save(Path(folder, str(fraction))).complete()
        norms = [policy.update(sequences, LEARNING_RATE).grad_norm for _ in range(2)]
        found["continued"][fraction] = (norms, _weights(mesh, architecture, policy))
    for saver, loader, gone_elsewhere in RESUMED:
        architecture, policy = _policy(mesh, config, hf_path, loader)
        if gone_elsewhere:
            policy.update(sequences[:3], 0.05)
        policy.load(Path(folder, str(saver)))
        in_groups = any("step" in group for group in policy._optimizer.param_groups)
        assert not (loader and in_groups), "megatron would give the loaded step count to every further update"
        norms = [policy.update(sequences, LEARNING_RATE).grad_norm for _ in range(2)]
        found["resumed"][saver, loader, gone_elsewhere] = (norms, _weights(mesh, architecture, policy))
    return found


def _hybrids(policy: Any) -> list[Any]:
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    optimizers = getattr(policy._optimizer, "chained_optimizers", [policy._optimizer])
    return [one.optimizer for one in optimizers if isinstance(one.optimizer, HybridDeviceOptimizer)]


def _gradients_on_host(hybrid: Any) -> tuple[int, int, int]:
    """(gradients, blocks of memory that they are in, elements of these without a gradient)."""
    gradients = [parameter.grad for parameter in hybrid.cpu_copys_map_gpu_param]
    storages = {gradient.untyped_storage().data_ptr(): gradient.untyped_storage() for gradient in gradients}
    unused = sum(storage.nbytes() for storage in storages.values()) - sum(one.nbytes for one in gradients)
    return len(gradients), len(storages), unused


def _fraction_on_host(policy: Any) -> float:
    hybrids = _hybrids(policy)
    whole = sum(p.numel() for hybrid in hybrids for group in hybrid.param_groups for p in group["params"])
    return sum(p.numel() for hybrid in hybrids for p in hybrid.cpu_copys_map_gpu_param) / max(whole, 1)


def _weights(mesh: Mesh, architecture: Any, policy: Any) -> dict[str, np.ndarray]:
    from minpro_megatron.publishing.gather import WeightGatherer

    buckets = WeightGatherer(policy.modules, architecture, mesh).buckets(bucket_bytes=1 << 20)
    return {name: tensor.float().numpy().copy() for bucket in buckets for name, tensor in bucket}


@pytest.fixture(scope="module")
def found(starts: dict[str, Start], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    start, parallel = starts["moe"], {"data": 2, "expert": 2}
    folder = tmp_path_factory.mktemp("state")
    config, sequences = step_config(parallel, row_tokens=128), make_sequences(8, 30)
    return run_mesh(_train_save_load, config, start.hf_path, str(folder), sequences, **parallel)[0]


def _assert_same(one: tuple[list[float], dict], other: tuple[list[float], dict]) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        np.testing.assert_array_equal(other[1][name], weight, err_msg=name)


def test_as_much_is_on_the_host_as_was_asked_for(found: dict[str, Any]) -> None:
    assert found["on_host"][0.0] == 0
    assert 0.5 <= found["on_host"][0.5] < 0.7  # whole parameters, so a little more
    assert found["on_host"][1.0] == 1


@pytest.mark.parametrize("fraction", FRACTIONS[1:])
def test_gradients_on_the_host_share_one_block(fraction: float, found: dict[str, Any]) -> None:
    """Each alone would be pinned with a power of two of bytes."""
    for gradients, blocks, unused in found["gradients"][fraction]:
        assert gradients > 2
        assert (blocks, unused) == (1, 0)


@pytest.mark.parametrize("fraction", FRACTIONS[1:])
def test_updates_on_the_host_are_those_of_the_gpu(fraction: float, found: dict[str, Any]) -> None:
    for when in ("trained", "continued"):
        _assert_same(found[when][0.0], found[when][fraction])


@pytest.mark.parametrize(("saver", "loader", "gone_elsewhere"), RESUMED)
def test_what_one_saved_the_other_continues(
    saver: float, loader: float, gone_elsewhere: bool, found: dict[str, Any]
) -> None:
    _assert_same(found["continued"][saver], found["resumed"][saver, loader, gone_elsewhere])
