"""The command lines and environments of the roles on one of several nodes."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.roles import (
    gpu_shares,
    offload_threads,
    role_environments,
    roles_of,
    save_by_option,
    torchrun,
    trainer_environment,
)
from minpro_megatron.launch.supervisor import RoleCommand
from minpro_megatron.launch.topology import NodeShare, Topology
from minpro_megatron.serving.addresses import is_all_interfaces, is_loopback

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """The node's index in the job, and the addresses of the nodes. `interface` is the one of `address`."""

    index: int
    address: str
    interface: str
    head_address: str
    rendezvous_port: int


def roles_on(config: RunConfig, share: NodeShare) -> list[str]:
    """The roles that a node with this share runs. External servers (server.urls) are monitored on the
    collector's node."""
    here = {
        "serve": share.num_servers > 0 or (bool(config.server.urls) and share.collects),
        "collect": share.collects,
        "timer": share.collects,
        "train": share.ranks > 0,
    }
    return [role for role in roles_of(config) if here[role]]


def node_gpus(config: RunConfig, share: NodeShare) -> tuple[int, int]:
    """The number of GPUs of the trainer and of the servers on a node with this share."""
    server = config.server
    own_gpus = server.device == "cuda" and server.engine != "reference"
    return (
        share.ranks if config.device == "cuda" else 0,
        share.num_servers * server.tensor_parallel if own_gpus else 0,
    )


def node_commands(
    config: RunConfig,
    config_file: Path,
    incarnation: int,
    topology: Topology,
    place: NodePlace,
    environment: Mapping[str, str] = os.environ,
    save_by: float | None = None,
) -> list[RoleCommand]:
    """The commands of the roles on node `place.index`, to be started together. `save_by`: as for role_commands."""
    share = topology.nodes[place.index]
    fabric = fabric_environment(place, environment) if len(topology.nodes) > 1 else {}
    threads = offload_threads(config, share.ranks, environment)
    own = {"train": trainer_environment(config.device) | threads | fabric, "serve": fabric}
    gpus = gpu_shares(*node_gpus(config, share), environment, config.server.takes_turns)
    environments = role_environments(config, environment, *gpus, own)
    starts = {"train": node_torchrun(topology, place)}
    options = ["--config", str(config_file), "--incarnation", str(incarnation)]
    return [
        RoleCommand(
            role=role,
            arguments=[
                *starts.get(role, [sys.executable]),
                "-m", "minpro_megatron", role, *options, *_role_options(config, role, topology, place),
                *(save_by_option(save_by) if role == "train" else []),
            ],
            environment=environments[role],
            stays=role == "serve",
            log_name=_log_name(role, topology, place.index),
        )
        for role in roles_on(config, share)
    ]  # fmt: skip


def node_torchrun(topology: Topology, place: NodePlace) -> list[str]:
    """The beginning of a command line that runs the rest of it as this node's part of the trainer's ranks."""
    nodes = topology.training_nodes
    if place.index not in nodes:
        return []
    ranks = topology.nodes[place.index].ranks
    if len(nodes) == 1:
        return torchrun(ranks)
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        f"--nnodes={len(nodes)}",
        f"--node-rank={nodes.index(place.index)}",
        # static: the ranks of a node are consecutive, independently of the order in which nodes join
        "--rdzv-backend=static",
        f"--master-addr={place.head_address}",
        f"--master-port={place.rendezvous_port}",
        f"--local-addr={place.address}",
        "--max-restarts=0",
    ]


def fabric_environment(place: NodePlace, environment: Mapping[str, str]) -> dict[str, str]:
    """Selects the network interface of process groups over several nodes, unless the environment already does."""
    chosen = {"GLOO_SOCKET_IFNAME": place.interface, "NCCL_SOCKET_IFNAME": f"={place.interface}"}
    return {name: environment.get(name, value) for name, value in chosen.items()}


def _role_options(config: RunConfig, role: str, topology: Topology, place: NodePlace) -> list[str]:
    if role not in ("serve", "collect") or len(topology.nodes) == 1:
        return []
    share = topology.nodes[place.index]
    host = config.server.host if role == "serve" else config.collector.host
    options = ["--host", place.address] if host_on_node(host, place.address) != host else []
    if role == "serve" and share.num_servers:
        options += ["--servers", f"{share.first_server}:{share.first_server + share.num_servers}"]
    return options


def host_on_node(host: str, address: str) -> str:
    """The address on which a role listens for other nodes: the node's `address`, unless the settings name a host that
    other nodes can connect to. 0.0.0.0 is not such a host, because it would lead each node to itself."""
    return address if is_loopback(host) or is_all_interfaces(host) else host


def _log_name(role: str, topology: Topology, index: int) -> str:
    several = {"train": topology.training_nodes, "serve": topology.serving_nodes}.get(role, [])
    return f"{role}-node-{index}" if len(several) > 1 else role
