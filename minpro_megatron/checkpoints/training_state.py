"""Weights and optimizer state in Megatron's distributed checkpoint format: saved on one mesh, resumed on any other.

Every rank writes what its optimizer owns: the range of elements that its data-parallel rank updates, of the weights,
the float32 weights and the moments. They are parts of tensors that do not depend on the mesh, under the parameter's own
name and shape. Nothing is gathered: a rank reads and writes only its own memory, one piece at a time. Megatron's
"fully_reshardable" has the same tensors, but gathers a data-parallel group's states on one rank.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor
from torch.nn import Parameter

from minpro_megatron.checkpoints.manifest import RunIdentity
from minpro_megatron.checkpoints.shard_writing import ShardWrite
from minpro_megatron.checkpoints.state_pieces import blocks_of, pieces
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.host_memory import cpu_offload
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.parallel.mesh import Mesh

# The prefixes of the optimizer's tensors before the parameter's name. Megatron calls the first one "param".
_PREFIX = "optimizer.state."
_STATES = {"param": "fp32_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


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
    """Start to write weights and optimizer state into the empty `folder`; both may change once this returns.
    Collective; `optimizer` is Megatron's."""
    optimizers = _distributed_optimizers(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _make_moments(optimizers)
        shardings = _shardings(chunks, mesh)
        owned = [*_owned_weights(optimizers, shardings), *_owned_states(optimizers, shardings)]
        state = _numbered([*owned, *_frozen_weights(shardings, mesh)])
        state["objects"] = _numbered(one for one in _sharded(chunks, mesh) if isinstance(one, ShardedObject))
        state["optimizer_step"] = max(_steps_done(one) for one in optimizers)
        return ShardWrite(state, folder, mesh, in_background)


def load_training_state(chunks: Sequence[GPTModel], optimizer: Any, folder: Path, mesh: Mesh) -> int:
    """Load weights and optimizer state from `folder`, which any mesh may have saved. Returns the number of updates that
    the optimizer has made. Collective.

    Raises ValueError if any value was not restored: torch's loader skips missing parts silently, and a run that is
    resumed with zero moments looks healthy but is not. After any error the weights are unusable.
    """
    optimizers = _distributed_optimizers(optimizer)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        _make_moments(optimizers)
        shardings = _shardings(chunks, mesh)
        wanted = [*_whole_weights(shardings), *_owned_states(optimizers, shardings)]
        for one in wanted:
            _data(one).fill_(torch.nan)
        # the data are views of the parameters and of the optimizer's tensors, which are thus loaded in place
        loaded = dist_checkpointing.load(_numbered(wanted), str(folder), validate_access_integrity=False)
        steps = int(cast(dict[str, Any], loaded)["optimizer_step"])
        for one in optimizers:
            _set_steps(one, steps)
        unrestored = {one.key for one in wanted if not _is_finite(_data(one))}
    found = sorted({name for names in mesh.from_all_ranks(unrestored) for name in names})
    if found:
        raise UserError(
            f"{folder}: {len(found)} tensors were not restored or are not finite, among them {found[0]}; the "
            "checkpoint is incomplete: take an earlier one"
        )
    return steps


def _sharded(chunks: Sequence[GPTModel], mesh: Mesh) -> Iterator[ShardedBase]:
    """Megatron's sharded state of the model: parameters and other objects."""
    for chunk in chunks:
        yield from chunk.sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp}).values()


def _shardings(chunks: Sequence[GPTModel], mesh: Mesh) -> dict[Parameter, ShardedTensor | ShardedTensorFactory]:
    """The place of each parameter of this rank in the checkpoint's tensors."""
    found = {}
    for one in _sharded(chunks, mesh):
        if isinstance(one, ShardedTensor | ShardedTensorFactory):
            assert isinstance(one.data, Parameter), f"{one.key}: only parameters are saved, and this is not one"
            found[one.data] = one
    return found


def _owned_weights(optimizers: Sequence[Any], shardings: dict[Parameter, Any]) -> Iterator[ShardedTensor]:
    for parameter, first, end in (owned for one in optimizers for owned in _owned_ranges(one)):
        values = parameter.detach().view(-1)[first:end]
        yield from pieces(blocks_of(shardings[parameter]), "", values, first)


def _frozen_weights(shardings: dict[Parameter, Any], mesh: Mesh) -> Iterator[ShardedTensor]:
    """The parameters that no optimizer owns: one of the ranks that have the same ones writes them."""
    if mesh.groups.dp_cp.rank() == 0:
        yield from _whole_weights({one: place for one, place in shardings.items() if not one.requires_grad})


def _whole_weights(shardings: dict[Parameter, Any]) -> Iterator[ShardedTensor]:
    for parameter, sharding in shardings.items():
        yield from pieces(blocks_of(sharding), "", parameter.detach().view(-1), 0)


def _owned_states(optimizers: Sequence[Any], shardings: dict[Parameter, Any]) -> Iterator[ShardedTensor]:
    for one in optimizers:
        for parameter, first, _ in _owned_ranges(one):
            tensors = one._get_main_param_and_optimizer_states(parameter)
            blocks = blocks_of(shardings[parameter])
            for name, saved_as in _STATES.items():
                yield from pieces(blocks, f"{_PREFIX}{saved_as}.", tensors[name].detach().view(-1), first)


def _owned_ranges(one: Any) -> Iterator[tuple[Parameter, int, int]]:
    """(parameter, first element, end) for this rank's shards of the optimizer's buffers."""
    for buffer in one.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _numbered(items: Any) -> dict[str, Any]:
    """The items in a dict, as Megatron requires. The names in the files are those of the items."""
    return {str(number): item for number, item in enumerate(items)}


def _data(one: ShardedTensor) -> Tensor:
    assert one.data is not None
    return one.data


def _is_finite(values: Tensor) -> bool:
    """Whether all values are finite, without a temporary tensor: minimum and maximum are NaN if a value is NaN."""
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))


def _make_moments(optimizers: Sequence[Any]) -> None:
    """Creates moments and step counts of zero if no update has created them, so that they can be saved or loaded."""
    for one in optimizers:
        if isinstance(one.optimizer, HybridDeviceOptimizer):
            cpu_offload.make_state(one.optimizer)
            continue
        one.init_state_fn(one.optimizer, one.config)
        if isinstance(one.optimizer, torch.optim.AdamW):  # fused optimizers count their steps in the groups
            for state in one.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _parts(one: Any) -> list[Any]:
    """The torch optimizers that apply the updates."""
    return one.optimizer.sub_optimizers if isinstance(one.optimizer, HybridDeviceOptimizer) else [one.optimizer]


def _steps_done(one: Any) -> int:
    """Updates so far; 0 on a rank that has no shard of this optimizer's parameters. Torch counts them per parameter,
    fused optimizers per group."""
    holders = [holder for part in _parts(one) for holder in (*part.state.values(), *part.param_groups)]
    return max((int(holder["step"]) for holder in holders if "step" in holder), default=0)


def _set_steps(one: Any, step: int) -> None:
    for part in _parts(one):
        if isinstance(part, torch.optim.AdamW):
            for (
                state
            ) in part.state.values():  # one tensor each: a shared tensor would count the updates of all parameters
                state["step"] = torch.tensor(float(step))
        else:
            for group in part.param_groups:
                group["step"] = step


def _distributed_optimizers(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
