"""What a machine must offer to a run whose trainer and servers use the same GPUs in turns."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil

from minpro_megatron.config.run import RunConfig
from minpro_megatron.files.disk_space import as_size
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.planning.memory import host_memory

# SGLang 0.5.23 starts with --enable-memory-saver only if this package can be imported.
MEMORY_SAVER = "torch_memory_saver"
CGROUPS = Path("/sys/fs/cgroup")
_SHARED_MODE = 0  # CU_COMPUTEMODE_DEFAULT: several processes may use the GPU


def shared_gpu_problems(config: RunConfig, modes: Sequence[int], ranks: int, host_bytes: int) -> Iterator[str]:
    """A line for each reason why `ranks` trainer ranks and their servers cannot take turns on the GPUs of this machine.
    `modes`: the compute mode of each GPU, as numbers of CUDA's driver. `host_bytes`: the memory of this machine."""
    if not config.server.takes_turns or config.device != "cuda":
        return
    for index, mode in enumerate(modes):
        if mode != _SHARED_MODE:
            yield (
                f"server.placement = shared: GPU {index} is in a compute mode in which one process at most may use it: "
                "set the default mode (nvidia-smi --compute-mode=0), or set server.placement to disaggregated"
            )
    if find_spec(MEMORY_SAVER) is None:
        yield (
            "server.placement = shared: SGLang releases memory with the package torch-memory-saver, which is not "
            "installed: install the version of environment/constraints_gpu.txt"
        )
    yield from _host_problems(config, ranks, host_bytes)


def _host_problems(config: RunConfig, ranks: int, host_bytes: int) -> Iterator[str]:
    """The kernel would end a process as soon as it copies its states to the host."""
    if not ranks or not (Path(config.model.hf_path) / "config.json").is_file():
        return  # a missing model is reported elsewhere
    needed = host_memory(config, read_architecture(config.model.hf_path), ranks, batch_tokens=0.0)
    if needed.total > host_bytes:
        yield (
            f"server.placement = shared: this machine has {as_size(host_bytes)} of memory, with the limit of its "
            f"container or job, and {ranks} trainer ranks need {as_size(needed.total)} ({as_size(needed.parked)} for "
            f"states while servers sample, {as_size(needed.checkpoint)} for a checkpoint that is being written): raise "
            "the limit (docker run --memory, sbatch --mem=0), set checkpoint.asynchronous to false, or set "
            "server.placement to disaggregated"
        )


def machine_memory_bytes(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """The memory that the processes of this machine, container or job may use together."""
    return min([psutil.virtual_memory().total, *_cgroup_limits(cgroups, own)])


def _cgroup_limits(cgroups: Path, own: Path) -> Iterator[int]:
    """The limits of this process's control group and of those above it, of version 2 and of version 1."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            folder, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # in a container the path may be that of the host, and the limit is in the folder that is mounted
        inside = folder / path.lstrip("/")
        for group in dict.fromkeys([inside, *inside.parents, folder]):
            if group.is_relative_to(folder):
                yield from _limit(group / name)


def _limit(path: Path) -> Iterator[int]:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return
    if text.isdecimal():  # else "max"
        yield int(text)
