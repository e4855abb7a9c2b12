"""This node of a run on several nodes: which one it is, what it does, and how the others reach it."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.preflight.node_checks import node_name
from minpro_megatron.launch.topology import NodeShare, Topology
from minpro_megatron.terminal_text import visible


@dataclass(frozen=True, kw_only=True)
class ThisNode:
    """The node `index` of a start, which all its nodes call `key`. `job` is the name that all starts of a job share;
    empty: nothing restarts this. `interface` has the address at which the other nodes reach this one; with a single
    node it is loopback."""

    config: RunConfig
    topology: Topology
    index: int
    job: str
    key: str
    host: str
    environment: Mapping[str, str]
    address: str
    interface: str

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def num_nodes(self) -> int:
        return len(self.topology.nodes)

    @property
    def share(self) -> NodeShare:
        return self.topology.nodes[self.index]

    @property
    def name(self) -> str:
        return node_name(self.index, self.host)

    def say(self, *lines: str, file: TextIO | None = None) -> None:
        """Prints the lines, with the node's name if there are several nodes."""
        prefix = f"{self.name}: " if self.num_nodes > 1 else ""
        for line in lines:
            print(f"{prefix}{visible(line)}", file=file or sys.stdout, flush=True)
