"""Weights and optimizer state in Megatron's distributed checkpoint format: saved on one mesh, resumed on any other.

Every rank writes its part. The optimizer's part is in the form that does not depend on the mesh ("fully reshardable"):
each parameter's float32 weights and moments under the parameter's own name and shape.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from minpro_megatron.actor import cpu_offload
from minpro_megatron.actor.shard_writing import ShardWrite
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.rollout.resume_point import RunIdentity
from minpro_megatron.weights.architecture import Architecture

# "mem_efficient": shards are gathered in host memory, by one data-parallel rank. Otherwise all do so, on the GPU, where
# beside weights and gradients there may be no room for another 8 bytes a parameter.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def run_identity(config: RunConfig, architecture: Architecture) -> RunIdentity:
    return RunIdentity(
        seed=config.seed,
        objective=config.objective.name,
        dtype=config.model.dtype,
        parallel=config.parallel.model_dump(mode="json"),
        architecture=msgspec.to_builtins(asdict(architecture)),
    )


def save_training_state(
    chunks: Sequence[GPTModel], optimizer: Any, folder: Path, mesh: Mesh, in_background: bool
) -> ShardWrite:
    """Begin to write weights and optimizer state into the empty `folder`; both may change once this returns.
    Collective; `optimizer` is megatron's."""
    with warnings.catch_warnings(), _short_collections():
        warnings.simplefilter("ignore")
        _make_moments(optimizer)
        state = _sharded_state(chunks, optimizer, mesh, is_loading=False)
        return ShardWrite(state, folder, mesh, in_background)


def load_training_state(chunks: Sequence[GPTModel], optimizer: Any, folder: Path, mesh: Mesh) -> None:
    """Fill weights and optimizer state from `folder`, whatever mesh saved it. Collective.

    Raises ValueError if any of the optimizer's numbers was not restored: megatron passes over a missing one in
    silence, and a run resumed with zero moments looks healthy and is not. After any error the weights are unusable.
    """
    with warnings.catch_warnings(), torch.no_grad(), _step_is_no_tensor(optimizer), _short_collections():
        warnings.simplefilter("ignore")
        _make_moments(optimizer)
        state = _sharded_state(chunks, optimizer, mesh, is_loading=True)
        for value in _optimizer_tensors(optimizer):
            value.fill_(torch.nan)
        loaded = cast(dict[str, Any], dist_checkpointing.load(state, str(folder)))
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"chunk{index}"], strict=True)
        for index, one in enumerate(_distributed_optimizers(optimizer)):
            one.load_state_dict(_as_own_state(one, loaded["optimizer"][index], loaded["optimizer_step"]))
            _count_apart(one, loaded["optimizer_step"])
            if isinstance(one.optimizer, HybridDeviceOptimizer):
                cpu_offload.let_parts_count(one.optimizer)
    unrestored = sum(int(not value.isfinite().all()) for value in _optimizer_tensors(optimizer))
    unrestored = sum(mesh.from_all_ranks(unrestored))
    if unrestored:
        raise ValueError(
            f"{folder}: {unrestored} tensors of the optimizer's state were not restored or are not finite; the "
            "checkpoint is incomplete: take an earlier one"
        )


def _sharded_state(chunks: Sequence[GPTModel], optimizer: Any, mesh: Mesh, is_loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": mesh.groups.dp_cp} | _SHARDING
    state: dict[str, Any] = {
        f"chunk{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    # Megatron splits the parameters over one or two optimizers, as the mesh has it, and would save the settings of
    # each. Only tensors under their parameter's name, and the step, mean the same on another mesh.
    optimizers = _distributed_optimizers(optimizer)
    weights = dict(state)
    of_optimizers = [one.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata) for one in optimizers]
    held = {index: one["param_state"] for index, one in enumerate(of_optimizers)}
    state["optimizer"] = {index: found for index, found in held.items() if found is not None}
    state["optimizer_step"] = max(_steps_done(one) for one in optimizers)
    return state


def _make_moments(optimizer: Any) -> None:
    """Moments and step counts of zero where no update has made any: megatron can neither save an optimizer without
    them nor load into one."""
    for one in _distributed_optimizers(optimizer):
        if isinstance(one.optimizer, HybridDeviceOptimizer):
            cpu_offload.make_state(one.optimizer)
            continue
        one.init_state_fn(one.optimizer, one.config)
        if isinstance(one.optimizer, torch.optim.AdamW):  # fused optimizers count their steps in the groups
            for state in one.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _as_own_state(one: Any, param_state: Any, step: int) -> dict[str, Any]:
    state = one.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["step"] = step
    return state | {"param_state": param_state, "param_state_sharding_type": _SHARDING["distrib_optim_sharding_type"]}


def _count_apart(one: Any, step: int) -> None:
    """A step count of its own for every parameter: megatron gives all of torch's AdamW the same tensor, which then
    counts every parameter of an update as an update."""
    for state in one.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(float(step))


def _steps_done(one: Any) -> int:
    """Updates so far; 0 on a rank that has no shard of this optimizer's parameters. torch counts them for every
    parameter, fused optimizers for every group."""
    holders = [*one.optimizer.state.values(), *one.optimizer.param_groups]
    return max((int(holder["step"]) for holder in holders if "step" in holder), default=0)


def _distributed_optimizers(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """This rank's shards of the float32 weights and of the moments."""
    for one in _distributed_optimizers(optimizer):
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                state = one.optimizer.state[parameter]
                yield from (value for name, value in state.items() if name != "step" and isinstance(value, Tensor))


@contextmanager
def _short_collections() -> Iterator[None]:
    """Within: the garbage collections that megatron asks for, one an optimizer, leave out all objects that exist now.
    Over those of torch and megatron each takes 0.3 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _step_is_no_tensor(optimizer: Any) -> Iterator[None]:
    """torch's AdamW keeps its step count as a tensor beside the moments; megatron restores it with the parameter
    groups, but then asks the checkpoint for it as if it were a moment."""
    patched: list[tuple[Any, Callable]] = []
    for one in _distributed_optimizers(optimizer):
        original = one._set_main_param_and_optimizer_states

        def restore(model_param: Any, tensors: dict[str, Any], original: Callable = original) -> None:
            tensors.setdefault("step", None)
            original(model_param, tensors)

        patched.append((one, original))
        one._set_main_param_and_optimizer_states = restore
    try:
        yield
    finally:
        for one, original in patched:
            one._set_main_param_and_optimizer_states = original
