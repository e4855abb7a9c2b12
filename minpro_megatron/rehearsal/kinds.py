"""The kinds of ranks of a mesh: ranks of one kind differ in nothing that a rehearsal shows."""

from minpro_megatron.config.parallel import ParallelConfig


def place_of(parallel: ParallelConfig, rank: int) -> str:
    """The rank's index on every axis that has more than one rank, such as "tensor 0/2, context 1/2, data 0/8"."""
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "data": parallel.data_size}
    found, rest = [], rank
    for axis, size in (*sizes.items(), ("pipeline", parallel.pipeline)):
        if size > 1:
            found.append(f"{axis} {rest % size}/{size}")
        rest //= size
    if parallel.expert > 1:
        found.append(f"expert {rank // parallel.expert_tensor % parallel.expert}/{parallel.expert}")
    return ", ".join(found) or "the only rank"


def representatives(parallel: ParallelConfig) -> list[int]:
    """One rank of each kind, in order. The first, a middle and the last pipeline stage differ, and rank 0 differs from
    the other ranks of the first stage: it gathers the weights that are published. Tensor, context, data and expert
    ranks of a stage hold equal shapes."""
    per_stage = parallel.world_size // parallel.pipeline
    stages = sorted({0, parallel.pipeline // 2, parallel.pipeline - 1})
    if parallel.pipeline_layers:  # stages with unequal numbers of layers
        stages = list(range(parallel.pipeline))
    firsts = [stage * per_stage for stage in stages]
    return sorted({*firsts, per_stage - 1})
