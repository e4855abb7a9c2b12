"""The nodes of one start, each in a thread, with a record in the place of their roles."""

import threading
from pathlib import Path

import pytest

from minpro_megatron.launch import node as node_module
from minpro_megatron.launch.node import NodeOptions, _Node, run_node
from minpro_megatron.launch.starts import Plan
from minpro_megatron.launch.topology import NodeShare, Topology
from tests.support.run_examples import write_example_files

TWO = Topology(nodes=(NodeShare(ranks=1), NodeShare(num_servers=1, collects=True)))
SLURM = {"SLURM_JOB_ID": "7"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_example_files(tmp_path)
    monkeypatch.setattr(node_module, "routable_address", lambda interface: ("127.0.0.1", "lo"))
    return tmp_path


def options(folder: Path, config: object, topology: Topology = TWO, **more: object) -> NodeOptions:
    (folder / "given.json").write_text(config.to_json())  # type: ignore[attr-defined]
    (folder / "topology.json").write_text(topology.to_json())
    given = {"config": folder / "given.json", "topology": folder / "topology.json"} | more
    return NodeOptions(**given)  # type: ignore[arg-type]


@pytest.fixture
def roles_started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, Plan]]:
    """Node, incarnation and plan of each node that comes so far, in the place of its roles."""
    started: list[tuple[int, int, Plan]] = []

    def run_roles(self: _Node, start: object, plan: Plan) -> int:
        started.append((self._this.index, start.incarnation, plan))  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr(_Node, "_run_roles", run_roles)
    return started


def run_all(given: NodeOptions, environment: dict[str, str], num_nodes: int = 2) -> list[int]:
    """The exit statuses of all nodes, run together; the first comes last."""
    statuses = [-1] * num_nodes

    def run(index: int) -> None:
        statuses[index] = run_node(given, environment | {"SLURM_NODEID": str(index), "SLURMD_NODENAME": f"h{index}"})

    threads = [threading.Thread(target=run, args=(index,)) for index in reversed(range(num_nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return statuses
