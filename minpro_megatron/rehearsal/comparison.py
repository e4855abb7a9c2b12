"""The planner's memory of a rank beside that of its rehearsal."""

from typing import Any

import torch

from minpro_megatron.models.architecture import Architecture
from minpro_megatron.planning.activations import Row, StageActivations
from minpro_megatron.planning.memory import rank_memory, shared_bucket_bytes, state_bytes
from minpro_megatron.rehearsal.live_bytes import LiveBytes
from minpro_megatron.rehearsal.record import Component, Phase
from minpro_megatron.rehearsal.subject import CANARIES, PARK_WEIGHTS, PUBLISH, UPDATE, Rehearsed

# The functions of Transformer Engine that allocate what it keeps.
_OF_WORKSPACES = (" get_cublas_workspace", " get_dummy_wgrad")


def compare_with_plan(what: Rehearsed, architecture: Architecture, policy: Any, memory: LiveBytes) -> list[Component]:
    """Bytes on the device, component by component, and of the host."""
    config, phases = what.config, memory.phases
    longest = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
    row = Row(config.batch.max_tokens_per_row, min(longest, config.batch.max_tokens_per_row))
    stage = policy._mesh.pipeline.rank()
    plan = rank_memory(config, architecture, row, what.rows, stage, what.imbalance)
    sizes = _state_sizes(policy)
    update = phases[UPDATE]
    workspaces = sum(size for line, size in update.left_lines["cuda"] if line.endswith(_OF_WORKSPACES))
    states = sum(sizes.values()) + workspaces
    found = [
        Component("weights", sizes["weights"], plan.weights),
        Component("gradients", sizes["gradients"], plan.gradients),
        Component("optimizer", sizes["optimizer"], plan.optimizer),
        Component("workspaces", workspaces, plan.workspaces),
        *_last_stage(phases, states, plan.activations),
        Component("activations' peak", update.peak["cuda"] - states, plan.activations.peak),
        Component("left after an update", update.left["cuda"] - states, 0),
        Component("training", update.peak["cuda"], plan.states + plan.workspaces + plan.activations.peak),
        Component("building", phases["build"].peak["cuda"], plan.building),
    ]
    in_turns = config.server.takes_turns
    beside = sizes["weights"] + workspaces if in_turns else states
    if CANARIES in phases:
        found.append(Component("canaries", phases[CANARIES].peak["cuda"] - beside, plan.canaries))
    if policy._mesh.rank % (config.parallel.world_size // config.parallel.pipeline) == 0:  # else it sends little
        found.append(Component("publishing", phases[PUBLISH].peak["cuda"] - beside, plan.publish))
    # the weights and states of the servers' turn; else a snapshot, and the current weights while it is in their place
    on_host = state_bytes(config, architecture, stage)[3] + (
        plan.weights + plan.optimizer if in_turns else 2 * plan.weights
    )
    if policy._mesh.rank == 0:
        on_host += shared_bucket_bytes(config, architecture)
    found.append(Component("host", max(phase.peak.get("cpu", 0) for phase in phases.values()), on_host))
    if in_turns:
        kept = phases[PARK_WEIGHTS].left.get("cuda", 0)
        found.append(Component("kept in the servers' turn", kept, plan.workspaces))
    return found


def _last_stage(phases: dict[str, Phase], states: int, planned: StageActivations) -> list[Component]:
    """What forward has saved when the loss begins, and what the logits take in addition."""
    forward, backward = (phases.get(f"{UPDATE} > log-probs {name}") for name in ("forward", "backward"))
    if forward is None or backward is None:
        return []
    return [
        Component("saved by forward", forward.entry["cuda"] - states, planned.saved),
        Component("logits", backward.peak["cuda"] - backward.entry["cuda"], planned.logits),
    ]


def _state_sizes(policy: Any) -> dict[str, int]:
    """Bytes on the device of what stays between updates. A storage counts once, where it is found first."""
    chunks = policy._chunks
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    tensors: dict[str, list[Any]] = {
        "weights": [parameter for chunk in policy.modules for parameter in chunk.parameters()],
        "gradients": [buffer.grad_data for buffer in buffers],
        "optimizer": [],
    }
    tensors["weights"] += [buffer.param_data for buffer in buffers if buffer.param_data is not None]
    for part in getattr(policy._optimizer, "chained_optimizers", [policy._optimizer]):
        for parameter in (parameter for group in part.optimizer.param_groups for parameter in group["params"]):
            moments = [value for value in part.optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
            tensors["optimizer"] += [parameter, *moments]
    counted: set[int] = set()
    sizes = {}
    for name, ones in tensors.items():
        storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in ones if one.device.type == "cuda"}
        sizes[name] = sum(storage.nbytes() for key, storage in storages.items() if key not in counted)
        counted |= storages.keys()
    return sizes
