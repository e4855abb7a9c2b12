"""What this rank's process groups were doing, from torch's flight recorder: for a rank that hangs.

The stacks of a hanging rank show that it waits for a collective. Which one, in which group, and which ranks have not
reached it, only the records of all ranks together show (docs/operations.md).
"""

from pathlib import Path

import torch._C._distributed_c10d as c10d

# By kind of group, the function of torch that returns the last collectives (TORCH_FR_BUFFER_SIZE, 2,000 unless it is
# set) as a pickle. Builds of torch without NCCL do not have its function.
_DUMPS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}


def write_collective_records(logs: Path, incarnation: int, rank: int) -> list[Path]:
    """Writes the last collectives of this rank, a file for each kind of group; returns their paths. The names end with
    the rank, as torch's own reader expects. Waits for no other rank.

    Each start of the run has a folder: torch's reader compares all files of one, and would take those of an earlier
    start for ranks of this one that have left none. They are kept, because a run may be started again after a hang."""
    folder = logs / "collectives" / str(incarnation)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, name in _DUMPS.items():
        if (dump := getattr(c10d, name, None)) is not None:
            path = folder / f"{kind}-rank-{rank}"
            # With stack traces torch imports its compiler, in a process that hangs: 1.5 s of processor time, which on a
            # busy machine is longer than the watchdog waits.
            path.write_bytes(dump(includeStackTraces=False))
            written.append(path)
    return written
