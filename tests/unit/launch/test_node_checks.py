"""What a node finds wrong with itself, and what the first node makes of all reports."""

import errno
import os
import random
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minpro_megatron.launch.preflight import node_checks
from minpro_megatron.launch.preflight.node_checks import (
    absence_problems,
    all_problems,
    clock_problems,
    gpu_problems,
    node_problems,
    parse_gpu_memory,
    routable_address,
)
from minpro_megatron.launch.preflight.problems import Problem
from minpro_megatron.launch.starts import Report
from minpro_megatron.launch.topology import NodeShare
from minpro_megatron.serving.ports import PORT_RANGE, listening_error
from tests.support.run_examples import example_config, write_example_files

EVERYTHING = NodeShare(ranks=1, num_servers=1, collects=True)


def only_line(config, share, address="127.0.0.1", is_transient=False):
    """The line of the only problem of the node."""
    (problem,) = node_problems(config, share, address, None)
    assert problem.is_transient == is_transient
    return problem.line


@pytest.fixture
def folder(tmp_path):
    write_example_files(tmp_path)
    (tmp_path / "runs" / "example").mkdir(parents=True)
    return tmp_path


def test_a_node_that_is_well_says_nothing(folder):
    assert node_problems(example_config(folder), EVERYTHING, "127.0.0.1", None) == []


def test_memory_in_use_is_somebody_elses_process():
    memory = parse_gpu_memory("0, 4, 81559\n1, 70211, 81559\n2, [N/A], 81559\n3, 9000, 81559\n")
    assert memory == [(0, 4, 81559), (1, 70211, 81559), (3, 9000, 81559)]
    assert list(gpu_problems(4, 4, memory[:1], None)) == []
    found = list(gpu_problems(4, 4, memory, None))
    assert all(problem.is_transient for problem in found)
    lines = [problem.line for problem in found]
    assert [line.split(":")[0] for line in lines] == ["GPU 1", "GPU 3"]
    assert re.search("70211 of 81559 MiB are in use .*: end the process .*slurm.exclude", lines[0])
    assert [problem.line.split(":")[0] for problem in gpu_problems(2, 2, memory, "0,3")] == ["GPU 3"]
    assert len(list(gpu_problems(2, 2, memory, "GPU-3ab,GPU-4cd"))) == 2  # by identifier: no number to go by


def test_missing_gpus_are_counted(folder, monkeypatch):
    (problem,) = gpu_problems(8, 7, [], None)
    assert problem.line.startswith("8 GPUs are needed and 7 usable: correct topology.gpus_per_node")
    assert not problem.is_transient
    # the job has eight on this node, one of which does not work
    assert [problem.is_transient for problem in gpu_problems(8, 7, [], "0,1,2,3,4,5,6,7")] == [True]
    monkeypatch.setattr(node_checks, "count_gpus", lambda: 1)
    monkeypatch.setattr(node_checks, "gpu_memory", list)
    config = example_config(folder, device="cuda", server={"device": "cuda", "count": 4, "tensor_parallel": 2})
    line = only_line(config, NodeShare(ranks=2, num_servers=3))
    assert line.startswith("8 GPUs are needed and 1 usable")


@pytest.mark.parametrize(
    ("share", "file", "field"),
    [
        (NodeShare(ranks=1), "megatron/manifest.json", "model.megatron_path"),
        (NodeShare(collects=True), "train.jsonl", "data.train_file"),
        (NodeShare(num_servers=1), "hf/config.json", "model.hf_path"),
    ],
)
def test_files_are_wanted_where_they_are_read(folder, share, file, field):
    (folder / file).unlink()
    line = only_line(example_config(folder), share)
    assert re.match(rf"{field} = {folder}/{file}: No such file or directory: put it on a file system", line)
    everything_else = {"megatron/manifest.json": NodeShare(collects=True)}.get(file, NodeShare(ranks=1))
    if field != "model.hf_path":
        assert node_problems(example_config(folder), everything_else, "127.0.0.1", None) == []


@pytest.mark.parametrize(("number", "is_transient"), [(errno.ESTALE, True), (errno.EIO, True), (errno.EACCES, False)])
def test_a_file_server_that_does_not_answer_is_no_wrong_setting(folder, monkeypatch, number, is_transient):
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    line = only_line(example_config(folder), NodeShare(), is_transient=is_transient)
    assert line.startswith(f"runs_dir: {folder}/runs/example cannot be written to ({os.strerror(number)})")


def test_weights_are_as_they_were_written_where_they_are_loaded(folder):
    config, trains = example_config(folder), NodeShare(ranks=1)
    (folder / "megatron/weights.distcp").write_text("{")
    line = only_line(config, trains)
    start = rf"model.megatron_path = {folder}/megatron: {folder}/megatron/weights.distcp: "
    assert re.match(rf"{start}1 bytes, but manifest.json says 2 bytes; convert again", line)
    assert node_problems(config, NodeShare(num_servers=1), "127.0.0.1", None) == []
    (folder / "megatron/weights.distcp").unlink()
    line = only_line(config, trains)
    assert re.match(rf"{start}no such file", line)

    (folder / "hf/model.safetensors").unlink()
    line = only_line(config, NodeShare(num_servers=1))
    assert line.startswith(f"model.hf_path = {folder}/hf: no *.safetensors file; download")


def test_the_checkpoint_to_go_on_from_is_whole_where_it_is_loaded(folder):
    config = example_config(folder)
    checkpoints = config.run_dir / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "latest").write_text("step-000010")
    line = only_line(config, NodeShare(ranks=1))
    assert re.match(r"the checkpoint to resume from: .*/step-000010/manifest.json: No such file", line)
    assert node_problems(config, NodeShare(num_servers=1, collects=True), "127.0.0.1", None) == []


def test_the_run_folder_must_be_there_on_every_node(folder):
    config = example_config(folder, name="elsewhere")
    line = only_line(config, EVERYTHING)
    assert re.match(r"runs_dir: .*/runs/elsewhere cannot be written to \(No such file", line)


@contextmanager
def listening_above(num_free: int, address: str) -> Iterator[int]:
    """A port that is listened on at `address`, above `num_free` on which nothing listens there; all of them are outside
    the range from which the system gives ports to others."""
    for port in random.SystemRandom().sample(range(PORT_RANGE.start + num_free, PORT_RANGE.stop), 200):
        if any(listening_error(address, below) for below in range(port - num_free, port)):
            continue
        with socket.socket() as taken:
            try:
                taken.bind((address, port))
            except OSError:
                continue
            taken.listen()
            yield port
            return
    raise AssertionError(f"no {num_free + 1} free ports in a row on {address}")


def test_ports_are_those_of_the_nodes_own_servers(folder):
    address = "127.0.0.4"  # which nothing else here uses
    with listening_above(5, address) as port:
        server = {"device": "cpu", "dtype": "float32", "count": 8, "first_port": port - 5, "host": address}
        config = example_config(folder, server=server)
        assert node_problems(config, NodeShare(first_server=0, num_servers=5), address, None) == []
        line = only_line(config, NodeShare(first_server=5, num_servers=3), address, is_transient=True)
        assert re.match(rf"server.first_port = {port - 5}: cannot listen on {address}:{port} \(Address", line)
        busy = example_config(folder, collector={"port": port, "host": address})
        assert node_problems(busy, NodeShare(ranks=1), address, None) == []
        line = only_line(busy, NodeShare(collects=True), address, is_transient=True)
        assert line.startswith(f"collector.port = {port}: cannot listen")


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost", "127.0.0.3"])
def test_ports_are_looked_at_where_roles_will_listen(folder, host):
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", 0))  # the node's address here
        taken.listen()
        port = taken.getsockname()[1]
        config = example_config(folder, collector={"host": host, "port": port})
        line = only_line(config, NodeShare(collects=True), "127.0.0.2", is_transient=True)
        assert line.startswith(f"collector.port = {port}: cannot listen on 127.0.0.2:{port}")


def report(node, clock_s=0.0, *lines):
    return Report(node=node, host=f"h{node}", clock_s=clock_s, problems=[Problem(line) for line in lines])


def test_a_clock_is_wrong_if_it_is_far_from_most():
    assert list(clock_problems([])) == []
    # the file server's own clock may be anything
    assert list(clock_problems([report(0, 100.0), report(1, 103.0), report(2, 98.0)])) == []
    (problem,) = clock_problems([report(0, 7.5), report(1, 0.1), report(2, 0.0)])
    assert problem.is_transient
    assert problem.line.startswith("node 0 (h0): its clock is 7.4 s ahead of the others', 5 s at most")
    (problem,) = clock_problems([report(0, 0.0), report(1, 0.1), report(2, -60.0)])
    assert problem.line.startswith("node 2 (h2): its clock is 60.0 s behind the others'")


def test_every_line_names_its_node(tmp_path):
    assert all_problems([report(0), report(1)], 2, 1.0, tmp_path) == []
    found = all_problems([report(0), report(2, 0.0, "no GPU", "no port")], 4, 120.0, tmp_path)
    lines = [problem.line for problem in found]
    assert [problem.is_transient for problem in found] == [False, False, True]
    assert lines[:2] == ["node 2 (h2): no GPU", "node 2 (h2): no port"]
    assert re.match(rf"node 1, 3: nothing from it in {tmp_path} after 120 s: runs_dir must be on a file", lines[2])
    assert list(absence_problems([report(0)], 1, 0, tmp_path)) == []


def test_an_address_that_others_can_reach(monkeypatch):
    addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}
    monkeypatch.setattr(node_checks, "interface_addresses", lambda: addresses)
    monkeypatch.setattr(node_checks, "_address_of_own_name", lambda: "127.0.1.1")
    monkeypatch.setattr(node_checks, "_address_of_default_route", lambda: "10.0.0.7")
    assert routable_address("") == ("10.0.0.7", "eth0")
    assert routable_address("ib0") == ("10.1.0.7", "ib0")
    with pytest.raises(ValueError, match=r"--interface ib1: .* it has: lo \(127.0.0.1\), eth0 \(10.0.0.7\)"):
        routable_address("ib1")
    monkeypatch.setattr(node_checks, "_address_of_own_name", lambda: "10.1.0.7")
    assert routable_address("") == ("10.1.0.7", "ib0")
    for look in ("_address_of_own_name", "_address_of_default_route"):
        monkeypatch.setattr(node_checks, look, lambda: "")
    with pytest.raises(ValueError, match=r"name the network interface in the profile \(slurm.interface\)"):
        routable_address("")
