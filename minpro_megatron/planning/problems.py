"""Memory and time limits that a run exceeds, and changes of settings with which it fits."""

from collections.abc import Iterator
from typing import Any

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture, refuse_uneven_cuts
from minpro_megatron.planning.activations import Row
from minpro_megatron.planning.gpus import GpuKind
from minpro_megatron.planning.memory import EXPERT_IMBALANCE, HostMemory, RankMemory, ServerMemory, rank_memory
from minpro_megatron.planning.simulator import Timeline
from minpro_megatron.planning.turns import SERVER_RESIDUE_BYTES, TurnMemory, fitting_share

MAX_REMEDIES = 3  # number of remedies in a message


def stage_memories(config: RunConfig, a: Architecture) -> list[RankMemory]:
    """The memory of a rank of each pipeline stage, with full rows."""
    longest = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
    row = Row(config.batch.max_tokens_per_row, min(longest, config.batch.max_tokens_per_row))
    sequences = config.batch.mini_batch_prompts * config.batch.responses_per_prompt
    # an update has at most one row per sequence, whatever their length
    micro_batches = -(-sequences // config.parallel.data_size)
    return [
        rank_memory(config, a, row, micro_batches, stage, EXPERT_IMBALANCE) for stage in range(config.parallel.pipeline)
    ]


def largest_rank(ranks: list[RankMemory]) -> RankMemory:
    return max(ranks, key=lambda rank: rank.total)


def rank_problems(config: RunConfig, a: Architecture, gpu: GpuKind, ranks: list[RankMemory]) -> list[str]:
    worst, limit = largest_rank(ranks), gpu.memory_bytes
    if worst.total <= limit:
        return []
    return [
        f"memory of a trainer rank of stage {worst.stage} = {worst.total / 1e9:.1f} GB (states "
        f"{worst.states / 1e9:.1f}, activations {worst.activations.peak / 1e9:.1f}) must be at most the "
        f"{limit / 1e9:.1f} GB of {gpu.name}: {memory_remedy(config, a, limit)}"
    ]


_MOMENTS = {
    "training": "the trainer trains",
    "receiving": "servers receive weights",
    "canaries": "servers generate canaries and the trainer has its weights",
    "sampling": "servers sample",
}


def turn_problems(
    config: RunConfig, a: Architecture, gpu: GpuKind, ranks: list[RankMemory], memory: TurnMemory
) -> list[str]:
    """One line for each moment at which a GPU of server.placement = shared would need more memory than it has."""
    limit = gpu.memory_bytes
    fewer = "use a mesh with fewer weights on a rank"
    share = f"set server.memory_fraction = {fitting_share(config, gpu, ranks):g}, or {fewer}"
    remedies = {
        "training": memory_remedy(config, a, limit - SERVER_RESIDUE_BYTES),
        "receiving": f"raise server.tensor_parallel = {config.server.tensor_parallel}, or {fewer}",
        "canaries": share,
        "sampling": share,
    }
    return [
        f"server.placement = shared: memory of a GPU while {_MOMENTS[name]} = {needed / 1e9:.1f} GB must be at most "
        f"the {limit / 1e9:.1f} GB of {gpu.name}: {remedies[name]}"
        for name, needed in vars(memory).items()
        if needed > limit
    ]


def memory_remedy(config: RunConfig, a: Architecture, limit: int) -> str:
    """What to do so that every trainer rank fits into `limit` bytes."""
    found = list(_fitting_changes(config, a, limit))[:MAX_REMEDIES]
    return f"set {' or '.join(found)}" if found else "take more GPUs for the trainer and cut the model further"


def server_problems(config: RunConfig, memory: ServerMemory) -> list[str]:
    longest = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
    if config.server.urls or memory.kv_tokens >= longest:
        return []
    return [
        f"server: the KV cache of {memory.kv_tokens:,} tokens next to {memory.weights / 1e9:.1f} GB of weights must "
        f"hold sampling.max_prompt_tokens + max_response_tokens = {longest:,}: raise server.tensor_parallel = "
        f"{config.server.tensor_parallel}" + (" or server.max_total_tokens" if config.server.max_total_tokens else "")
    ]


def request_problems(config: RunConfig, timeline: Timeline) -> list[str]:
    """Problems of the request timeout: groups that exceed it are retried, exceed it again, and then end the run."""
    limit_s, longest_s = config.server.request_timeout_s, max(timeline.request_s)
    if longest_s <= limit_s:
        return []
    late = sum(seconds > limit_s for seconds in timeline.request_s)
    return [
        f"server.request_timeout_s = {limit_s:g} must be at least the {longest_s:.0f} s that the longest of "
        f"{len(timeline.request_s)} groups takes on a server ({late} take longer than the limit): raise it, or give "
        "the servers fewer concurrent requests (server.max_running_requests)"
    ]


def host_problems(host: HostMemory, gpu: GpuKind) -> list[str]:
    if host.total <= gpu.host_memory_bytes:
        return []
    parts = {
        f"a smaller bound or delay of staleness ({host.snapshots / 1e9:.0f} GB of weight snapshots)": host.snapshots,
        f"checkpoint.asynchronous = false ({host.checkpoint / 1e9:.0f} GB)": host.checkpoint,
        f"a lower optimizer.cpu_offload ({host.offloaded / 1e9:.0f} GB)": host.offloaded,
        f"server.placement = disaggregated ({host.parked / 1e9:.0f} GB of states in turns)": host.parked,
        f"model.routing_replay = none, or a lower sampling.top_k ({host.routes / 1e9:.0f} GB)": host.routes,
    }
    largest = max(parts, key=lambda name: parts[name])
    return [
        f"host memory of a node with {host.ranks} trainer ranks = {host.total / 1e9:.0f} GB must be at most the "
        f"{gpu.host_memory_bytes / 1e9:.0f} GB of a node of {gpu.name}: the largest part falls with {largest}"
    ]


def least_recomputation(config: RunConfig, a: Architecture, limit: int) -> str:
    """The setting with which a run that recomputes whole layers recomputes the fewest of them and every rank still fits
    into `limit` bytes; empty if that is the setting of `config`."""
    model = config.model
    if model.recompute != "full":
        return ""
    largest = max(config.parallel.chunk_layers(a.num_layers))
    choices = {"recompute = none": {"recompute": "none", "recompute_layers": 0}}
    choices |= {f"recompute_layers = {layers}": {"recompute_layers": layers} for layers in range(1, largest)}
    for name, choice in choices.items():
        if choice.get("recompute_layers") == model.recompute_layers and "recompute" not in choice:
            return ""
        if largest_rank(stage_memories(_with(config, model=choice), a)).total <= limit:
            return f"model.{name}"
    return ""


def _fitting_changes(config: RunConfig, a: Architecture, limit: int) -> Iterator[str]:
    """Changes of settings with which every rank fits, the cheapest first."""
    for names, changed in _changes(config):
        try:
            refuse_uneven_cuts(a, changed.parallel)
        except UserError:
            continue
        if largest_rank(stage_memories(changed, a)).total <= limit:
            yield names


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Single changes that save memory with the same number of GPUs, then the same with full recomputation."""
    model, parallel, batch = config.model, config.parallel, config.batch
    whole = _with(config, model={"recompute": "full", "recompute_modules": (), "recompute_layers": 0})
    if model.recompute == "none":
        yield "model.recompute = selective", _with(config, model={"recompute": "selective"})
    if model.recompute != "full":
        yield "model.recompute = full", whole
    if model.recompute_layers:
        yield "model.recompute_layers = 0", whole
    longest = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
    if batch.max_tokens_per_row // 2 >= longest:
        row = batch.max_tokens_per_row // 2
        yield f"batch.max_tokens_per_row = {row}", _with(config, batch={"max_tokens_per_row": row})
    for base in (config, whole):
        also_changed = [] if base is config else ["model.recompute = full"]
        if also_changed and base == config:
            return
        for axis in ("expert", "context", "tensor", "pipeline"):
            changed = _doubled(parallel, axis)
            if changed is not None:
                data = [] if changed.data == parallel.data_size else [f"parallel.data = {changed.data}"]
                names = [f"parallel.{axis} = {getattr(changed, axis)}", *data, *also_changed]
                yield " and ".join(names), base.model_copy(update={"parallel": changed})
        if config.device == "cuda" and model.dtype == "bfloat16" and config.optimizer.cpu_offload < 1:
            yield (
                " and ".join(["optimizer.cpu_offload = 1", *also_changed]),
                _with(base, optimizer={"cpu_offload": 1.0}),
            )


def _with(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=change) for name, change in sections.items()}
    )


def _doubled(parallel: ParallelConfig, axis: str) -> ParallelConfig | None:
    """Twice the degree with the same number of ranks; None if the axes do not allow it."""
    values = parallel.model_dump() | {axis: 2 * getattr(parallel, axis), "data": parallel.data_size}
    if axis == "pipeline":
        values["pipeline_layers"] = ()
    if axis != "expert":
        if parallel.data_size % 2:
            return None
        values["data"] = parallel.data_size // 2
    try:
        return ParallelConfig.model_validate(values)
    except ValueError:
        return None
