"""Which CPUs are beside a GPU, by the files in which Linux says it."""

import os
import threading
from pathlib import Path

import pytest

from minpro_megatron.parallel.numa import bind_threads, bind_to_node, cpus_beside, cpus_for, cpus_in

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


@pytest.mark.parametrize(
    ("allowed", "num_ranks", "expected"),
    [
        (range(16), (2, 2), 8),
        (range(1, 16), (2, 2), 7),  # a CPU that the machine keeps for itself
        (range(6), (2, 0), 0),  # 4 of the 6 CPUs would be left for two ranks
        (range(6), (1, 1), 4),
        (range(2, 5), (1, 3), 2),  # fewer CPUs than ranks
        (range(2, 5), (4, 0), 0),
    ],
)
def test_a_rank_is_bound_only_to_at_least_its_share_of_the_cpus(
    allowed: range, num_ranks: tuple[int, int], expected: int, tmp_path: Path
) -> None:
    """A job may have few CPUs on the GPU's node: bound to them its ranks would wait for each other."""
    files = machine(tmp_path, "0", node0="0-3,8-11", node1="4-7,12-15")
    other = files / "bus" / "pci" / "devices" / "0000:9b:00.0"
    other.mkdir()
    (other / "numa_node").write_text("1\n")
    ranks = [ADDRESS] * num_ranks[0] + [other.name] * num_ranks[1]
    assert len(cpus_for(ADDRESS, ranks, set(allowed), files)) == expected


def test_a_container_that_forbids_to_bind_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(thread: int, cpus: set[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    listed = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    files = machine(tmp_path, "0", node0=listed)
    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    with caplog.at_level("INFO"):
        bind_to_node(ADDRESS, [ADDRESS], files)
    assert [record.getMessage() for record in caplog.records] == [
        "not bound to CPUs: [Errno 1] Operation not permitted"
    ]


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
