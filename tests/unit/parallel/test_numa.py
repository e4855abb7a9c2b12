"""Which CPUs are beside a GPU, by the files in which Linux says it."""

import os
import threading
from pathlib import Path

import pytest

from minpro_megatron.parallel.numa import bind_threads, cpus_beside, cpus_in

ADDRESS = "0000:1b:00.0"


def machine(folder: Path, numa_node: str, **cpulists: str) -> Path:
    """The files of a machine with a GPU on `numa_node` and with these nodes."""
    device = folder / "bus" / "pci" / "devices" / ADDRESS
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{numa_node}\n")
    for node, listed in cpulists.items():
        (folder / "devices" / "system" / "node" / node).mkdir(parents=True)
        (folder / "devices" / "system" / "node" / node / "cpulist").write_text(f"{listed}\n")
    return folder


@pytest.mark.parametrize(
    ("numa_node", "allowed", "expected"),
    [
        ("0", range(16), {0, 1, 2, 3, 8, 9, 10, 11}),
        ("1", range(16), {4, 5, 6, 7, 12, 13, 14, 15}),
        ("1", range(2, 6), {4, 5}),  # a job with a part of the machine
        ("1", range(4), set()),  # whose CPUs are all on the other node
        ("-1", range(16), set()),  # a single node
        ("2", range(16), set()),  # a node whose files the container does not show
    ],
)
def test_the_cpus_are_those_of_the_gpus_node_that_the_job_may_use(
    numa_node: str, allowed: range, expected: set[int], tmp_path: Path
) -> None:
    files = machine(tmp_path, numa_node, node0="0-3,8-11", node1="4-7,12-15")
    assert cpus_beside(ADDRESS, set(allowed), files) == expected


def test_a_machine_that_does_not_say_is_left_alone(tmp_path: Path) -> None:
    assert cpus_beside(ADDRESS, {0}, tmp_path) == set()
    assert cpus_beside("0000:ff:00.0", {0}, machine(tmp_path, "0", node0="0")) == set()


def test_lists_of_the_kernel_are_read() -> None:
    assert cpus_in("0-1,5,7-8\n") == {0, 1, 5, 7, 8}
    assert cpus_in("\n") == set()  # a node of memory only


def test_all_threads_are_bound() -> None:
    before, ended, other = os.sched_getaffinity(0), threading.Event(), threading.Event()
    found: list[set[int]] = []

    def work() -> None:
        other.set()
        ended.wait()
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    other.wait()
    try:
        bind_threads({min(before)})
        ended.set()
        thread.join()
        assert [os.sched_getaffinity(0), *found] == [{min(before)}] * 2
    finally:
        ended.set()
        bind_threads(before)
