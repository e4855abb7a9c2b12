"""Binds a rank to the CPUs beside its GPU.

Linux places memory on the NUMA node of the CPU that first writes to it. A rank that runs on the other socket has its
pinned copies, its checkpoints and the optimizer states of optimizer.cpu_offload there, and every copy crosses the link
between the sockets.
"""

import logging
import os
from collections.abc import Sequence, Set
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_SYSTEM_FILES = Path("/sys")


def bind_beside(device: torch.device) -> None:
    """Binds this process, with the threads that it has and will start, to the CPUs of the NUMA node of its GPU. Nothing
    is bound where the machine or the container does not say which these are or forbids it, or where the job may use
    too few of them for its ranks on that node."""
    # torchrun's number of ranks on this machine, of which each has the GPU of its number
    local_ranks = range(int(os.environ.get("LOCAL_WORLD_SIZE", "0")))
    bind_to_node(pci_address(device), [pci_address(torch.device("cuda", rank)) for rank in local_ranks])


def bind_to_node(address: str, of_ranks: Sequence[str], system_files: Path = _SYSTEM_FILES) -> None:
    """As `bind_beside`, for the GPU at `address`; those of all ranks on this machine are at `of_ranks`."""
    try:
        cpus = cpus_for(address, of_ranks, os.sched_getaffinity(0), system_files)
        if not cpus:
            log.info(
                "not bound to CPUs: the NUMA node of the GPU at %s is unknown, or has too few usable CPUs",
                address,
            )
            return
        bind_threads(cpus)
    except OSError as error:
        log.info("not bound to CPUs: %s", error)
        return
    log.info("bound to the %d usable CPUs of the NUMA node of the GPU at %s", len(cpus), address)


def cpus_for(address: str, of_ranks: Sequence[str], allowed: Set[int], system_files: Path = _SYSTEM_FILES) -> set[int]:
    """The CPUs beside the GPU at `address`, if they give each rank on their node at least its share of the `allowed`
    ones; otherwise none. `of_ranks` are the GPUs of all ranks on this machine."""
    cpus = cpus_beside(address, allowed, system_files)
    share = max(1, len(allowed) // max(1, len(of_ranks)))
    num_beside = sum(cpus_beside(one, allowed, system_files) == cpus for one in of_ranks)
    return cpus if len(cpus) >= share * num_beside else set()


def pci_address(device: torch.device) -> str:
    """The address of the GPU as Linux writes it, such as 0000:1b:00.0."""
    found = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def cpus_beside(address: str, allowed: Set[int], system_files: Path = _SYSTEM_FILES) -> set[int]:
    """Those of the `allowed` CPUs that are on the NUMA node of the PCI device at `address`; empty if that is unknown or
    the machine has a single node."""
    try:
        node = int((system_files / "bus/pci/devices" / address / "numa_node").read_text())
        listed = (system_files / f"devices/system/node/node{node}/cpulist").read_text()  # a single node may be -1
    except (OSError, ValueError):
        return set()
    return cpus_in(listed) & allowed


def cpus_in(listed: str) -> set[int]:
    """The CPUs in a list of the kernel.

    >>> sorted(cpus_in("0-2,8"))
    [0, 1, 2, 8]
    """
    found: set[int] = set()
    for part in listed.strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1)) if first else set()
    return found


def bind_threads(cpus: Set[int]) -> None:
    """Binds all threads of this process; those that they start inherit it."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cpus)
        except ProcessLookupError:  # it has ended
            continue
