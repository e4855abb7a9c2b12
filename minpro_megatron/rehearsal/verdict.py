"""Whether rehearsed ranks speak against a launch."""

from collections.abc import Iterable, Iterator, Sequence

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.planning.gpus import GpuKind, gpu_kind
from minpro_megatron.planning.memory import ALLOCATOR_SHARE, CONTEXT_BYTES, EXPERT_IMBALANCE
from minpro_megatron.planning.problems import largest_rank, memory_remedy, stage_memories
from minpro_megatron.rehearsal.processes import rehearse_kinds
from minpro_megatron.rehearsal.record import Phase, RankRehearsal
from minpro_megatron.rehearsal.subject import Rehearsed


def refuse_what_does_not_fit(recipe: str, config: RunConfig, overrides: Sequence[str], gpu: str) -> None:
    """Raises UserError with the lines of `rehearsal_problems`, if there are any."""
    if problems := rehearsal_problems(recipe, config, overrides, gpu):
        raise UserError(problems)


def rehearsal_problems(recipe: str, config: RunConfig, overrides: Sequence[str], gpu: str) -> list[str]:
    """Rehearses one rank of each kind, with the planner's imbalance of experts, and prints a line for each. Returns a
    line for each mismatch, and for each rank that needs more than a GPU of the kind `gpu` has."""
    what = Rehearsed(recipe, config, rank=0, imbalance=EXPERT_IMBALANCE)
    kind, problems = gpu_kind(gpu), []
    print("rehearsing one trainer rank of each kind; a rank takes minutes", flush=True)
    for found in rehearse_kinds(what, overrides):
        phase = highest_phase(found.phases)
        needed = needed_bytes(phase.peak.get("cuda", 0)) / 1e9
        print(f"rank {found.rank} ({found.place}): {needed:.1f} GB in the phase {phase.name!r}", flush=True)
        problems += rank_problems(found, what, kind)
    return problems


def rank_problems(found: RankRehearsal, what: Rehearsed, gpu: GpuKind) -> list[str]:
    """One line for each mismatch, and one if the rank needs more memory than the GPU has."""
    return [*_mismatches(found), *_memory(found, what, gpu)]


def _mismatches(found: RankRehearsal) -> Iterator[str]:
    for problem in found.problems:
        yield (
            f"rehearsal of rank {found.rank} ({found.place}): {problem}; correct the line of code, or the setting that "
            f"leads to it, and try `minpro rehearse {found.recipe} --rank {found.rank}`"
        )


def needed_bytes(tensors: int) -> int:
    """Of a GPU, for tensors of so many bytes: with the planner's assumptions for what a rehearsal does not see."""
    return round(tensors * (1 + ALLOCATOR_SHARE)) + CONTEXT_BYTES["cuda"]


def _memory(found: RankRehearsal, what: Rehearsed, gpu: GpuKind) -> Iterator[str]:
    phase = highest_phase(found.phases)
    tensors = phase.peak.get("cuda", 0)
    needed = needed_bytes(tensors)
    if needed <= gpu.memory_bytes:
        return
    config, architecture = what.checked()
    # a remedy is planned: what was rehearsed above the plan has to fit in addition
    above = max(0, needed - largest_rank(stage_memories(config, architecture)).total)
    yield (
        f"rehearsal of rank {found.rank} ({found.place}): {needed / 1e9:.1f} GB in the phase {phase.name!r} (tensors "
        f"{tensors / 1e9:.1f}) must be at most the {gpu.memory_bytes / 1e9:.1f} GB of {gpu.name}: "
        f"{memory_remedy(config, architecture, gpu.memory_bytes - above)}"
    )


def highest_phase(phases: Iterable[Phase]) -> Phase:
    """The phase with the highest peak on the device: the innermost of those that share it."""
    return max(phases, key=lambda phase: (phase.peak.get("cuda", 0), phase.name.count(" > ")))
