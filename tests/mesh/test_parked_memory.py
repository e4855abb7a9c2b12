"""A policy whose memory moves to the host between updates: the same bits as without moves, and nothing stays behind.

On a CPU the device's memory is host memory too, so a move is a copy from one storage to another, and the emptied
storages are counted. That a GPU's memory is released, and how fast, is the GPU check `parked_memory`.
"""

import gc
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_sequences
from tests.mesh.steps import step_config
from tests.support.long_cases import long_rows_after
from tests.support.offload_without_gpu import offload_works_here

pytestmark = pytest.mark.mesh

LEARNING_RATE = 1e-3


def _policy(mesh: Mesh, config: RunConfig, hf_path: str, dtype: torch.dtype, offload: float) -> Any:
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, dtype)
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    # a copy is not validated: RunConfig refuses the offload without a GPU
    optimizer = config.optimizer.model_copy(update={"cpu_offload": offload})
    return Policy(config.model_copy(update={"optimizer": optimizer}), architecture, chunks, mesh)


def _train(
    mesh: Mesh, config: RunConfig, hf_path: str, folder: str, sequences: list[TokenSequence], dtype: str, offload: float
) -> dict[str, Any]:
    """What this rank computes with a policy that stays on its device and with one that moves, and bytes."""
    offload_works_here()
    found: dict[str, Any] = {"released": []}
    for name in ("stays", "moves"):
        policy = _policy(mesh, config, hf_path, getattr(torch, dtype), offload)
        moves = name == "moves"
        scores, norms = [], []
        for step in range(3):
            if moves:
                found["released"].append(_released(policy))
                policy.to_device()
                policy.to_device()  # nothing is left to do
                policy.to_host(but_weights=True)
            scores.append(policy.score(sequences).tobytes())
            if moves:
                if step == 1:
                    policy.to_host()
                policy.to_device()
            norms.append(policy.update(sequences, LEARNING_RATE).grad_norm)
        path = Path(folder, name)
        if mesh.rank == 0:
            path.mkdir()
        torch.distributed.barrier()
        write = policy.save(path, in_background=True)
        if moves:
            policy.to_host()  # while it is written
        write.is_done(wait=True)
        write.complete()
        policy.to_device()
        found[name] = (scores, norms, _digests(_states(policy)), _digests(_weights(policy)))
        norms = [policy.update(sequences, LEARNING_RATE).grad_norm]  # from other states than those in the checkpoint
        policy.load(path)
        found[f"{name}, loaded"] = (norms, _digests(_states(policy)), _digests(_weights(policy)))
    return found


def _weights(policy: Any) -> Iterator[Tensor]:
    yield from (parameter for chunk in policy.modules for parameter in chunk.parameters())


def _gradients(policy: Any) -> Iterator[Tensor]:
    for chunk in policy._chunks:
        yield from (buffer.grad_data for buffer in chunk.buffers + chunk.expert_parallel_buffers)


def _states(policy: Any) -> Iterator[Tensor]:
    """With the offload also what stays in host memory on a GPU: here it is on the same device, and moves."""
    for part in policy._optimizer.chained_optimizers:
        for adam in (part.optimizer, *getattr(part.optimizer, "sub_optimizers", ())):
            yield from (parameter for group in adam.param_groups for parameter in group["params"])
            for state in adam.state.values():
                yield from (value for _, value in sorted(state.items()) if isinstance(value, Tensor))


def _digests(tensors: Iterable[Tensor]) -> list[str]:
    return [hashlib.sha256(one.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest() for one in tensors]


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def _released(policy: Any) -> dict[str, int]:
    """Bytes of tensors of this process before and after `to_host`, without the host's copies; of which kind they are,
    and what is left of these."""
    kinds = {"weights": _weights, "gradients": _gradients, "states": _states}
    before = {name: _bytes(of_kind(policy)) for name, of_kind in kinds.items()}
    everything = _bytes([*_weights(policy), *_gradients(policy), *_states(policy)])
    live = _live_bytes(policy)
    policy.to_host()
    left = {f"{name} left": _bytes(of_kind(policy)) for name, of_kind in kinds.items()}
    found = before | left | {"everything": everything, "gone": live - _live_bytes(policy)}
    return found | {"parked": policy.parked_bytes}


def _live_bytes(policy: Any) -> int:
    gc.collect()
    hosts = [one for parked in (policy._memory._weights, policy._memory._states) for one in parked._host]
    return _bytes(one for one in gc.get_objects() if isinstance(one, Tensor)) - _bytes(hosts)


@pytest.fixture
def sequences() -> list[TokenSequence]:
    return make_sequences(8, 30)


@pytest.mark.parametrize(
    ("parallel", "dtype", "offload"),
    long_rows_after(
        1,
        [
            ({"tensor": 2, "expert": 2}, "float32", 0.0),
            ({"pipeline": 2, "data": 2}, "bfloat16", 0.0),
            ({"pipeline": 2, "virtual_pipeline": 2}, "float32", 0.0),
            ({"data": 2, "expert": 2}, "bfloat16", 0.5),
        ],
    ),
    ids=str,
)
def test_moving_changes_no_bit_and_leaves_nothing(
    parallel: dict[str, int],
    dtype: str,
    offload: float,
    starts: dict[str, Start],
    sequences: list[TokenSequence],
    tmp_path: Path,
) -> None:
    config, hf_path = step_config(parallel, row_tokens=128), starts["moe"].hf_path
    for found in run_mesh(_train, config, hf_path, str(tmp_path), sequences, dtype, offload, **parallel):
        assert found["moves"] == found["stays"]
        assert found["moves, loaded"] == found["stays, loaded"]
        scores, _, states, weights = found["stays"]
        assert len(set(scores)) == 3, "every update changes the scores"
        assert (len(states) > 2, len(weights) > 2) == (True, True)
        assert found["stays, loaded"][1:] == (states, weights)
        for bytes_of in found["released"]:
            assert {name: bytes_of[f"{name} left"] for name in ("weights", "gradients", "states")} == {
                "weights": 0, "gradients": 0, "states": 0
            }  # fmt: skip
            assert bytes_of["gone"] >= bytes_of["everything"] > 0
            assert bytes_of["parked"] == bytes_of["everything"] - bytes_of["gradients"]
        # the moments exist from the first update on
        assert found["released"][1]["parked"] > found["released"][0]["parked"]


def _refusals(mesh: Mesh, config: RunConfig, hf_path: str, folder: str, sequences: list[TokenSequence]) -> list[str]:
    from minpro_megatron.publishing.gather import WeightGatherer

    policy = _policy(mesh, config, hf_path, torch.float32, 0.0)
    gatherer = WeightGatherer(policy.modules, _architecture(hf_path), mesh)
    lines = []

    def note(action: Any) -> None:
        with pytest.raises(AssertionError) as raised:
            action()
        lines.append(str(raised.value))

    policy.to_host(but_weights=True)
    assert sum(len(bucket) for bucket in gatherer.buckets(1 << 20))
    policy.take_snapshot("kept")
    note(lambda: policy.update(sequences, LEARNING_RATE))
    note(lambda: policy.save(Path(folder)))
    policy.to_host()
    note(lambda: policy.score(sequences))
    note(lambda: policy.take_snapshot("kept"))
    note(lambda: policy.use_snapshot("kept"))
    note(lambda: next(gatherer.buckets(1 << 20)))
    note(lambda: policy.load(Path(folder)))
    policy.to_device()
    with policy.use_snapshot("kept"):
        note(policy.to_host)
    return lines


def _architecture(hf_path: str) -> Any:
    from minpro_megatron.models.architecture import read_architecture

    return read_architecture(hf_path)


def test_what_needs_the_memory_is_refused(
    starts: dict[str, Start], sequences: list[TokenSequence], tmp_path: Path
) -> None:
    """A read of emptied memory would end the process, or worse."""
    (lines,) = run_mesh(_refusals, step_config({}, row_tokens=128), starts["moe"].hf_path, str(tmp_path), sequences)
    states, weights = "the optimizer states are in host memory", "the weights are in host memory"
    assert lines == [
        f"update: {states}", f"save: {states}", f"forward: {weights}", f"snapshot: {weights}", f"snapshot: {weights}",
        weights, f"load: {weights}", "to_host: the 'kept' weights are swapped in",
    ]  # fmt: skip
